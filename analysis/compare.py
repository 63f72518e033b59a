"""Recipes side by side: one line per recipe and setting, and which recipes differ significantly."""

import textwrap
from collections.abc import Sequence

import pandas as pd

from analysis.load import PAPER, swept
from analysis.load import SETTING as SET
from analysis.points import ANSWERS, MEASURES, RECIPES, RUN, settings_text, tidied
from analysis.render import Column, Table, compact, describe, fixed, keys, significant, span
from analysis.statistics import (
    BASELINE,
    FEW,
    UNMEASURED,
    Measure,
    Pairs,
    Value,
    mean,
    pairs_of,
    samples_of,
)
from analysis.style import LETTERS, PAGE, Marks, Picture, grid, legend, looks, picture, styled
from polykv.evaluation.statistics import PairedRatio

# What a line is about; what never varies is said once, in the caption.
SWEPT = (
    "model",
    "weights",
    "dtype",
    "device",
    "document",
    "context_tokens",
    "n_agents",
    "protocol",
    "reader",
    "backend",
    "seed",
)
SETTING = [name for name in SWEPT if name != "n_agents"]
HEADERS = {"context_tokens": "context", "n_agents": "agents"}
MB = 1e3  # of a GB
ALWAYS = ("document", "context_tokens")  # in a panel's title
ACROSS, HEIGHT = 2, 2.3  # panels in a row, inches

SCALED = {"stored": MB, "resident": MB}
COLUMNS = (
    Column("stored_bits", "bits", fixed(2)),
    Column("perplexity_delta", "Δppl % [95 %]", fixed(2, "+"), interval=True),
    Column("kl_mean", "KL", compact),
    Column("kl_p99", "KL 99 %", compact),
    Column("stored", "stored MB", fixed(1)),
    Column("resident", "resident MB", fixed(1)),
    Column("stored_ratio", "ratio", fixed(2)),
    Column("full_layers_stored", "ratio, full layers", fixed(2)),
    Column("same_top1", "top-1", fixed(3)),
    Column("exact_match", "exact", fixed(2)),
    Column("contains", "contains", fixed(2)),
    Column("bertscore_f1", "BERT F1", fixed(3), interval=True),
    Column("bertscore_floor", "floor", fixed(3)),
    Column("empty_answers", "empty", fixed(2)),
    Column("nominal_ratio", "nominal", fixed(3)),
    Column("full_layers_nominal", "nominal, full layers", fixed(3)),
    Column("perplexity", "ppl", fixed(2)),
)
LEGEND = (
    "bits: stored per cached value, all metadata counted; ratio: to fp16; Δppl, KL (nats per token) and top-1: against "
    "the uncompressed cache, read alike; stored: all bytes kept of the prefix for all agents"
)
RESIDENT = "; resident: peak above the loaded model while all agents decode"
# A column of nothing else is left out; one of values that could not be had says why.
BASE = Value(None, note="the baseline that the others are compared with")
ABSENT = (BASE, UNMEASURED)
RELATIVE = ("perplexity_delta", "kl_mean", "kl_p99", "same_top1", "bertscore_f1", "bertscore_floor")


def table(rows: pd.DataFrame) -> Table | None:
    """One line per recipe, by model, text, context, agents, reader and settings where these vary; None without rows."""
    found = tidied(rows)
    if found.empty:
        return None
    apart = swept(found)
    vary = [name for name in SWEPT if found.loc[found["recipe"] != BASELINE, name].nunique() > 1]
    about = [*SWEPT, *apart, "recipe"]
    columns = [*COLUMNS, *_further(found)]
    lines = []
    for key, part in found.groupby(about, dropna=False, sort=False):
        lines.append(dict(zip(about, map(_whole, key), strict=True)) | _measured(part, columns))
    lines.sort(key=_order)
    present = [c for c in columns if any(line[c.name] not in ABSENT for line in lines)]
    named = [
        Column(name, HEADERS.get(name, name.removeprefix(SET)), key=True)
        for name in (*vary, *apart)
    ]
    columns = [*named, *keys("recipe"), *present]
    shown = [{c.name: line[c.name] for c in columns} for line in lines]
    explained = LEGEND + RESIDENT * any(c.name == "resident" for c in present) + "."
    legend = " ".join(filter(None, [explained, _reader_floors(found)]))
    return Table("compare", _caption(found, vary), columns, shown, legend)


def _further(found: pd.DataFrame) -> list[Column]:
    """Metrics of documents that have no column above, such as a new one of polykv/evaluation/per_token."""
    known = {measure.metric for measure in MEASURES.values()}
    own = found[found["sample"].notna() & found["n"].notna() & ~found["metric"].isin(known)]
    own = own[own["agent"].isna()] if "agent" in own else own
    return [Column(name, name, significant) for name in sorted(set(own["metric"]))]


def _measured(part: pd.DataFrame, columns: Sequence[Column]) -> dict[str, Value]:
    base = part["recipe"].iloc[0] == BASELINE
    return {
        column.name: BASE if base and column.name in RELATIVE else _figure(part, column.name)
        for column in columns
    }


def _figure(part: pd.DataFrame, name: str) -> Value:
    found = MEASURES.get(name, Measure(name, reduce=mean)).of(part)
    factor = SCALED.get(name)
    return found.map(lambda value: value * factor) if factor else found


def _reader_floors(found: pd.DataFrame) -> str:
    """The largest difference that each reader makes on an uncompressed cache; the table's differences exclude it."""
    floors = found[found["metric"].str.startswith("reader_floor_")]
    said = []
    for reader, part in floors.groupby("floor_of", sort=False):
        each = [cell for _, cell in part.groupby("cell", sort=False)]
        kl, delta = (
            max(abs(MEASURES[f"reader_floor_{name}"].of(cell).value or 0) for cell in each)
            for name in ("kl", "delta")
        )
        said.append(
            f"Reader {reader} against dequantize on the uncompressed cache: KL at most {kl:.2g}, |Δppl| at most "
            f"{delta:.2g} %, not included in the columns above."
        )
    return " ".join(said)


def _order(line: dict) -> tuple:
    """Sort key: by setting, the baseline first, then from the most stored bits to the fewest."""
    place = [str(line[name]).zfill(8) for name in SWEPT if name != "reader"]
    bits = line["stored_bits"].value or 0
    return (*place, line["recipe"] != BASELINE, -bits, line["recipe"], line["reader"])


def _caption(found: pd.DataFrame, vary: Sequence[str]) -> str:
    """The caption: the settings that all lines share."""
    one = found[found["recipe"] != BASELINE] if (found["recipe"] != BASELINE).any() else found
    said = {name: str(_whole(one[name].iloc[0])) for name in SWEPT if name not in vary}
    parts = [said.get("model", "several models")]
    parts[0] += f" ({said['weights']})" if "weights" in said else ""
    parts += [said[name] for name in ("document",) if name in said]
    parts += [f"{said['context_tokens']} tokens"] if "context_tokens" in said else []
    parts += [f"{said['n_agents']} agents"] if "n_agents" in said else []
    parts += [f"protocol {said['protocol']}"] if said.get("protocol", PAPER) != PAPER else []
    parts += [f"reader {said['reader']}"] if "reader" in said else []
    parts += [f"{said.get('device', 'several devices')} {said.get('dtype', 'several dtypes')}"]
    documents = found[found["metric"] == "kl"].groupby("cell")["sample"].nunique()
    if len(documents):
        parts.append(f"{span(documents)} document{'s' if documents.max() > 1 else ''}")
    parts.append(f"commit {' and '.join(sorted(set(found['commit'])))}")
    return f"Recipes compared: {', '.join(parts)}"


def separations(rows: pd.DataFrame) -> list[str]:
    """One line per setting: which recipes differ significantly, and how many documents a tie would need."""
    found = tidied(rows)
    about = [*SETTING, *swept(found)]
    scored = samples_of(found, "kl", [*about, "recipe"])
    scored = scored[scored > 0]  # not the baseline, which is its own reader
    lines = []
    settings = list(scored.groupby(about, dropna=False, sort=False))
    apart = [name for name in about if scored.index.get_level_values(name).nunique() > 1]
    for key, part in settings:
        named = dict(zip(about, key, strict=True))
        where = ", ".join(f"{name.removeprefix(SET)}={named[name]}" for name in apart)
        where += ": " if where else ""
        pairs = pairs_of(part.droplevel(about).swaplevel())
        if len(pairs.names) > 1:
            lines.append(where + _separated(pairs))
    return lines


def _separated(found: Pairs) -> str:
    n = found.documents
    if n < FEW:
        return (
            f"{n} document{'s' if n > 1 else ''}: too few to compare recipes pair by pair; a longer text, or "
            "n_documents=8 or more, would"
        )
    order = "KL from least to most: " + " < ".join(found.names)
    pairs = f"{len(found.p)} pair{'s' * (len(found.p) > 1)}"
    how = f"paired t on log KL of {n} documents, Holm over {pairs}"
    if not found.ties:
        return f"{order}; every pair differs ({how})"
    return f"{order}; not told apart ({how}): " + "; ".join(
        _tie(*pair, found.ratios[pair]) for pair in found.ties
    )


def _tie(better: str, worse: str, found: PairedRatio) -> str:
    needed = f"; about {found.documents_needed:,} documents would" if found.documents_needed else ""
    return (
        f"{worse} over {better} {found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}], where a ratio of "
        f"{found.detectable:.2f} would have shown{needed}"
    )


@styled
def figure(rows: pd.DataFrame) -> Picture | str | None:
    """Mean KL with its interval against stored bits; one panel per text, context and reader."""
    found = tidied(rows[~rows["metric"].isin(ANSWERS)])  # whose dtype is no matter here
    if found.empty:
        return None
    about = [*SETTING, *swept(found)]
    panels = []
    for key, part in found.groupby(about, dropna=False, sort=False):
        spots = {name: _spot(of) for name, of in part.groupby("recipe", sort=False)}
        spots = {name: spot for name, spot in spots.items() if spot}
        if spots:
            panels.append((dict(zip(about, key, strict=True)), spots))
    if not panels:
        return "no recipe with both stored bits and a KL divergence above 0"
    differ = [n for n in about if len({setting[n] for setting, _ in panels}) > 1]
    names = sorted({n for _, spots in panels for n in spots}, key=lambda n: (n not in RECIPES, n))
    look = looks(names)
    canvas, axes = grid(len(panels), ACROSS, HEIGHT)
    for ax, (setting, spots) in zip(axes, panels, strict=True):
        for name, (bits, kl) in spots.items():
            reach = None if kl.low is None else [[kl.value - kl.low], [kl.high - kl.value]]
            tint, marker = look[name]
            ax.errorbar(bits, kl.value, yerr=reach, fmt=marker, color=tint, label=name)
        ax.set_title(_title({n: setting[n] for n in about if n in (*ALWAYS, *differ)}))
        ax.set_yscale("log")
        ax.set_xlabel("stored bits per cached value")
        ax.set_ylabel("mean KL, nats per token")
    return picture(
        legend(canvas),
        "Mean KL divergence to the uncompressed cache against stored bits per value, for each recipe",
        describe(found[found["metric"] == "kl"]),
        Marks(panels=True, lines="Markers"),
    )


def _title(told: dict[str, object]) -> str:
    """A panel's title of what tells it from the others, the run on a line of its own."""
    run = ", ".join(f"{told[n]}" for n in RUN if n in told)
    named = {"context_tokens": "{:,} tokens", "seed": "seed {}"}
    rest = [n for n in told if n not in RUN and not n.startswith(SET)]
    own = ", ".join(named.get(n, "{}").format(told[n]) for n in rest) + settings_text(told)
    width = int(LETTERS * PAGE / ACROSS)
    return "\n".join(textwrap.fill(line, width) for line in (run, own) if line)


def _spot(part: pd.DataFrame) -> tuple[float, Value] | None:
    """Stored bits and mean KL of a recipe, where it has both."""
    bits, kl = MEASURES["stored_bits"].of(part), MEASURES["kl_mean"].of(part)
    if bits.value is None or kl.value is None or kl.value <= 0:
        return None
    return bits.value, kl


def _whole(value: object) -> object:
    """pd.NA as None."""
    return None if value is pd.NA else value


TABLES = {"compare": table}
FIGURES = {"compare": figure}
BELOW = {"compare": separations}
