"""Recipes side by side: a line for each recipe and setting, and which of them the documents tell apart."""

import math
from collections.abc import Sequence
from itertools import combinations

import pandas as pd
from matplotlib.figure import Figure as Canvas

from analysis.colours import colours
from analysis.layout import sheet, styled
from analysis.reduce import BASELINE, RECIPES, Value, cell_dtype
from analysis.render import Column, Table, compact, fixed, keys
from polykv.evaluation.statistics import PairedRatio, holm, paired_ratio

# What a line is about; what never varies is said once, in the caption.
SWEPT = (
    "model",
    "weights",
    "dtype",
    "device",
    "document",
    "context_tokens",
    "n_agents",
    "reader",
    "seed",
)
SETTING = [name for name in SWEPT if name not in ("n_agents", "reader")]
MB = 1e3  # of a GB
ALPHA = 0.05
ACROSS, HEIGHT = 2, 2.3  # panels in a row, inches
FEW = 3  # documents below which no pair is tested

# Column -> (metric, protocol or None for any, factor). Columns further right are the first to be left out of a
# narrow terminal.
MEASURES = {
    "stored_bits": ("compression_ratio", "stored", None),
    "stored_ratio": ("compression_ratio", "stored", 1.0),
    "perplexity_delta": ("perplexity_delta", None, 1.0),
    "kl_mean": ("kl_mean", None, 1.0),
    "kl_p99": ("kl_p99", None, 1.0),
    "same_top1": ("same_top1", None, 1.0),
    "stored": ("kv_memory", "stored", MB),
    "resident": ("kv_memory", "resident", MB),
    "exact_match": ("exact_match", None, 1.0),
    "contains": ("contains", None, 1.0),
    "bertscore_f1": ("bertscore_f1", None, 1.0),
    "bertscore_floor": ("bertscore_floor", None, 1.0),
    "empty_answers": ("empty_answers", None, 1.0),
    "nominal_ratio": ("compression_ratio", "nominal", 1.0),
    "perplexity": ("perplexity", None, 1.0),
}
COLUMNS = (
    Column("stored_bits", "bits", fixed(2)),
    Column("perplexity_delta", "Δppl % [95 %]", fixed(2, "+"), interval=True),
    Column("kl_mean", "KL", compact),
    Column("kl_p99", "KL 99 %", compact),
    Column("stored", "stored MB", fixed(1)),
    Column("resident", "resident MB", fixed(1)),
    Column("stored_ratio", "ratio", fixed(2)),
    Column("same_top1", "top-1", fixed(3)),
    Column("exact_match", "exact", fixed(2)),
    Column("contains", "contains", fixed(2)),
    Column("bertscore_f1", "BERT F1", fixed(3), interval=True),
    Column("bertscore_floor", "floor", fixed(3)),
    Column("empty_answers", "empty", fixed(0)),
    Column("nominal_ratio", "nominal", fixed(3)),
    Column("perplexity", "ppl", fixed(2)),
)
LEGEND = (
    "bits: stored per cached value, all metadata counted; ratio: to fp16; Δppl, KL (nats per token) and top-1: against "
    "the uncompressed cache, read alike; stored: all bytes kept for all agents; resident: peak above the loaded model "
    "while all agents decode."
)
# A column of nothing else is left out; one of values that could not be had says why.
BASE = Value(None, note="the baseline that the others are compared with")
UNASKED = Value(None, note="not measured")
ABSENT = (BASE, UNASKED)
RELATIVE = ("perplexity_delta", "kl_mean", "kl_p99", "same_top1", "bertscore_f1", "bertscore_floor")


def mine(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows in the order of their making, those of one cell under one dtype and one reader."""
    found = cell_dtype(rows)
    read = found["reader"].where(found["reader"] != "").groupby(found["cell"]).transform("first")
    read = found["reader"].where(found["reader"] != "", read).fillna("")
    found = found.assign(floor_of=read, reader=read.where(found["recipe"] != BASELINE, "unshared"))
    return found.sort_values("created_at", kind="stable")


def table(rows: pd.DataFrame) -> Table | None:
    """One line per recipe, by model, text, context, agents and reader where these vary; None without rows."""
    found = mine(rows)
    if found.empty:
        return None
    vary = [name for name in SWEPT if found.loc[found["recipe"] != BASELINE, name].nunique() > 1]
    lines = []
    for key, part in found.groupby([*SWEPT, "recipe"], dropna=False, sort=False):
        line = dict(zip((*SWEPT, "recipe"), key, strict=True))
        lines.append({name: _whole(value) for name, value in line.items()} | _measured(part))
    lines.sort(key=_order)
    present = [c for c in COLUMNS if any(line[c.name] not in ABSENT for line in lines)]
    named = keys(*vary)
    shown = [{c.name: line[c.name] for c in (*named, *keys("recipe"), *present)} for line in lines]
    legend = " ".join(filter(None, [LEGEND, _reader_floors(found)]))
    return Table(
        "compare", _caption(found, vary), [*named, *keys("recipe"), *present], shown, legend
    )


def _measured(part: pd.DataFrame) -> dict[str, Value]:
    values = {}
    for name, (metric, protocol, factor) in MEASURES.items():
        rows = part[part["metric"] == metric]
        rows = rows if protocol is None else rows[rows["protocol"] == protocol]
        values[name] = _value(rows.iloc[-1] if len(rows) else None, factor)
        if name in RELATIVE and part["recipe"].iloc[0] == BASELINE:
            values[name] = BASE
    return values


def _value(row: pd.Series | None, factor: float | None) -> Value:
    if row is None:
        return UNASKED
    if pd.isna(row["value"]):
        return Value(None, note=row["note"])
    if factor is None:
        return Value(16 / row["value"])
    ends = [None if pd.isna(row[name]) else row[name] * factor for name in ("ci_low", "ci_high")]
    return Value(row["value"] * factor, *ends, n=_whole(row["n"]))


def _reader_floors(found: pd.DataFrame) -> str:
    """What each reader costs without any recipe, at most over the settings; no line's differences include it."""
    rows = found[found["metric"].str.startswith("reader_floor_") & found["value"].notna()]
    said = []
    for reader, part in rows.groupby("floor_of", sort=False):
        kl, delta = (
            part.loc[part["metric"] == f"reader_floor_{name}", "value"].abs().max()
            for name in ("kl_mean", "perplexity_delta")
        )
        said.append(
            f"Reader {reader} against inject on the uncompressed cache: KL at most {kl:.2g}, |Δppl| at most "
            f"{delta:.2g} %, not included in the columns above."
        )
    return " ".join(said)


def _order(line: dict) -> tuple:
    """By setting; the baseline first, then from the most stored bits to the fewest."""
    place = [str(line[name]).zfill(8) for name in SWEPT if name != "reader"]
    bits = line["stored_bits"].value or 0
    return (*place, line["recipe"] != BASELINE, -bits, line["recipe"], line["reader"])


def _caption(found: pd.DataFrame, vary: Sequence[str]) -> str:
    """What all lines have in common."""
    one = found[found["recipe"] != BASELINE] if (found["recipe"] != BASELINE).any() else found
    said = {name: str(_whole(one[name].iloc[0])) for name in SWEPT if name not in vary}
    parts = [said.get("model", "several models")]
    parts[0] += f" ({said['weights']})" if "weights" in said else ""
    parts += [said[name] for name in ("document",) if name in said]
    parts += [f"{said['context_tokens']} tokens"] if "context_tokens" in said else []
    parts += [f"{said['n_agents']} agents"] if "n_agents" in said else []
    parts += [f"reader {said['reader']}"] if "reader" in said else []
    parts += [f"{said.get('device', 'several devices')} {said.get('dtype', 'several dtypes')}"]
    scored = found[found["metric"] == "document_kl_mean"]
    documents = scored.groupby("cell")["sample"].nunique()
    if len(documents):
        n = " to ".join(dict.fromkeys(f"{x}" for x in (documents.min(), documents.max())))
        parts.append(f"{n} document{'s' if documents.max() > 1 else ''}")
    parts.append(f"commit {' and '.join(sorted(set(found['commit'])))}")
    return f"Recipes compared: {', '.join(parts)}"


def separations(rows: pd.DataFrame) -> list[str]:
    """Which recipes the documents tell apart, a line for each setting; where they cannot, what would."""
    found = mine(rows)
    scored = found[(found["metric"] == "document_kl_mean") & found["value"].gt(0)]
    lines = []
    settings = list(scored.groupby(SETTING, dropna=False, sort=False))
    for _, part in settings:
        where = ""
        if len(settings) > 1:
            first = part.iloc[0]
            where = f"{first['document']}, {first['context_tokens']:.0f} tokens: "
        samples = part.drop_duplicates(["recipe", "sample"], keep="last")
        wide = samples.pivot(index="sample", columns="recipe", values="value").dropna()
        if wide.shape[1] > 1:
            lines.append(where + _separated(wide))
    return lines


def _separated(wide: pd.DataFrame) -> str:
    """`wide`: mean KL of each document (row) under each recipe (column)."""
    n = len(wide)
    if n < FEW:
        return (
            f"{n} document{'s' if n > 1 else ''}: too few to compare recipes pair by pair; a longer text, or "
            "n_documents=8 or more, would"
        )
    names = sorted(wide.columns, key=lambda name: wide[name].mean())
    pairs = list(combinations(names, 2))
    level = ALPHA / len(pairs)  # of Holm's first step
    tested = {pair: paired_ratio(wide[pair[1]], wide[pair[0]], level) for pair in pairs}
    adjusted = holm([found.p for found in tested.values()])
    tied = [pair for pair, p in zip(pairs, adjusted, strict=True) if p >= ALPHA]
    how = (
        f"paired t on log KL of {n} documents, Holm over {len(pairs)} pair{'s' * (len(pairs) > 1)}"
    )
    order = "KL from least to most: " + " < ".join(names)
    if not tied:
        return f"{order}; every pair differs ({how})"
    return f"{order}; not told apart ({how}): " + "; ".join(
        _tie(*pair, tested[pair]) for pair in tied
    )


def _tie(better: str, worse: str, found: PairedRatio) -> str:
    needed = f"; about {found.documents_needed:,} documents would" if found.documents_needed else ""
    return (
        f"{worse} over {better} {found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}], where a ratio of "
        f"{found.detectable:.2f} would have shown{needed}"
    )


@styled
def figure(rows: pd.DataFrame) -> Canvas | str | None:
    """Mean KL with its interval against stored bits, a panel for each text and context."""
    found = mine(rows)
    if found.empty:
        return None
    means = found[(found["metric"] == "kl_mean") & found["value"].gt(0)]
    ratio = found[(found["metric"] == "compression_ratio") & (found["protocol"] == "stored")]
    bits = 16 / ratio.groupby(["cell"])["value"].last()
    means = means.assign(bits=means["cell"].map(bits)).dropna(subset=["bits"])
    if means.empty:
        return "no recipe with both stored bits and a KL divergence above 0"
    panels = list(means.groupby(SETTING, dropna=False, sort=False))
    names = sorted(set(means["recipe"]), key=lambda name: (name not in RECIPES, name))
    tints = colours(names)
    canvas, rows_of_axes = sheet(
        [""] * math.ceil(len(panels) / ACROSS), min(len(panels), ACROSS), HEIGHT
    )
    axes = [ax for row in rows_of_axes for ax in row]
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, (_, part) in zip(axes, panels, strict=False):
        last = part.drop_duplicates("recipe", keep="last")
        for _, row in last.iterrows():
            reach = [[row["value"] - row["ci_low"]], [row["ci_high"] - row["value"]]]
            reach = None if pd.isna(row["ci_low"]) else reach
            ax.errorbar(row["bits"], row["value"], yerr=reach, fmt="o", color=tints[row["recipe"]],
                        label=row["recipe"])  # fmt: skip
        first = part.iloc[0]
        ax.set_title(f"{first['document']}, {first['context_tokens']:,.0f} tokens")
        ax.set_yscale("log")
        ax.set_xlabel("stored bits per cached value")
        ax.set_ylabel("mean KL, nats per token")
    shown = {
        text: handle
        for ax in axes
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    canvas.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=min(len(shown), 4)
    )
    return canvas


def _whole(value: object) -> object:
    """A number that is whole, as one; what is missing as None."""
    if isinstance(value, float):
        return None if pd.isna(value) else int(value)
    return value
