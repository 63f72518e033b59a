"""PolyKV's memory: the published GB and ratio beside the measured ones, how they come about, and its claims."""

import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from analysis import published, style
from analysis.catalog import AGREES, NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, Claim
from analysis.points import IN_PLACE, Point, having, points
from analysis.published import Figure
from analysis.render import Column, Table, describe, fixed, keys, memory, span
from analysis.statistics import BASELINE, Value
from polykv.config import load_group

STUDY = ("polykv_memory", "compare")
MEMORY = ("paper", "stored", "resident")
RATIOS = ("nominal_ratio", "stored_ratio")
WIDTH = 100  # characters of a line of the text
ACCOUNTINGS = {
    "paper": "paper accounting (fp32, computed)",
    "stored": "stored (bytes kept)",
    "resident": "resident (measured)",
}
HEIGHT = 1.75  # inches of a panel
SUFFIX = f", {style.READERS[IN_PLACE][0]}"
DASHED = f"the pool is read {style.READERS[IN_PLACE][0]} (white markers), not copied by each agent"
ROUNDING = 0.0005  # of the published GB
NOTICEABLE = 0.95  # of the memory: a repeat differs by a percent or two
CROWD = ("model", "weights", "dtype", "device", "document", "context_tokens", "n_agents")
claim_of = partial(Claim, "polykv")  # (table, verdict, claim, what was found)
Key = TypeVar("Key", bound=Hashable)


def polykv_memory(rows: pd.DataFrame) -> Table | None:
    """Published GB beside ours in the same accounting, and beside stored and resident memory; None without rows."""
    found = having(points(rows), *MEMORY)
    if not found:
        return None
    place = ("model", "weights", "document", "context_tokens", "n_agents")
    unshared = {_of(p, place): p["paper"] for p in found if p.recipe == BASELINE}

    def measured(p: Point, said: Value) -> dict[str, Value | str]:
        """The measured columns; fp16 unshared is half the fp32 that the paper counts."""
        fp32 = unshared.get(_of(p, place), Value(None, note=f"no {BASELINE} row beside it"))
        fp16 = fp32 if fp32.value is None else Value(fp32.value / 2)
        own = {"reader": p.reader, "fp16": fp16}
        return own | {"difference": minus(p["paper"], said)} | {name: p[name] for name in MEMORY}

    lines, answered = [], []
    for figure in (f for f in published.load("polykv") if f.metric == "kv_memory"):
        answer = published.memory_answer(figure, found)
        line = {"section": "published configurations", "model": figure.model}
        line |= {"context": figure.document_tokens, "agents": figure.n_agents}
        line |= {"recipe": figure.recipe, "published": figure.value}
        if isinstance(answer, Point):
            answered.append(answer)
            line |= measured(answer, figure.value)
        else:
            absent = Value(None, note=answer)
            line |= dict.fromkeys(("difference", "fp16", *MEMORY), absent) | {
                "reader": "not stated"
            }
        lines.append(line)
    none = Value(None, note="no published figure for this model, context and number of agents")
    for p in (p for p in found if p not in answered):
        line = {"section": "measured only", "model": p.model, "context": p.context_tokens}
        line |= {"agents": p.n_agents or "any", "recipe": p.name, "published": none}
        lines.append(line | measured(p, none))
    columns = [
        *keys("model", "context", "agents", "recipe", "reader"),
        Column("published", "published", memory),
        Column("paper", "paper accounting", memory),
        Column("difference", "difference", fixed(5, "+")),
        Column("fp16", "fp16 unshared", memory),
        Column("stored", "stored", memory),
        Column("resident", "resident", memory),
    ]
    caption = (
        "KV memory in GB (10^9 bytes): published by PolyKV, worked out as it did, and measured. "
        f"Recipe {BASELINE}: every agent keeps its own cache; other recipes: one pool. Paper accounting "
        "counts fp32 and only the prefilled 70 %; the true figures are fp16 unshared (half of that "
        "fp32), stored (every byte kept) and resident (measured while all agents decode, with what "
        f"readers rebuild). {described(rows, 'kv_memory')}"
    )
    return Table("polykv_memory", caption, columns, lines)


def polykv_ratio(rows: pd.DataFrame) -> Table | None:
    """Nominal and stored ratio per recipe and head_dim beside the published 2.91; None without any."""
    found = having(points(rows), *RATIOS)
    if not found:
        return None
    said = next(f.value for f in published.load("polykv") if f.metric == "compression_ratio")
    lines = []
    for (name, dim), mine in grouped(found, lambda p: (p.name, p.head_dim)).items():
        contexts = sorted({p.context_tokens or 0 for p in mine})
        line = {"recipe": name, "head_dim": dim}
        line["models"] = ", ".join(dict.fromkeys(p.model for p in mine))
        line["contexts"] = " and ".join(f"{context:,}" for context in contexts)
        is_theirs = mine[0].recipe == "polykv"
        line["published"] = said if is_theirs else Value(None, note="not published")
        for ratio in RATIOS:
            values = [p[ratio].value for p in mine if p[ratio].value is not None]
            line[f"{ratio}_low"] = Value(min(values)) if values else mine[0][ratio]
            line[f"{ratio}_high"] = Value(max(values)) if values else mine[0][ratio]
        line["difference"] = minus(line["nominal_ratio_low"], line["published"])
        lines.append(line)
    columns = [
        *keys("recipe", "head_dim", "models", "contexts"),
        Column("published", "published", fixed(2)),
        Column("nominal_ratio_low", "nominal, least", fixed(3)),
        Column("nominal_ratio_high", "nominal, most", fixed(3)),
        Column("difference", "difference", fixed(3, "+")),
        Column("stored_ratio_low", "stored, least", fixed(3)),
        Column("stored_ratio_high", "stored, most", fixed(3)),
    ]
    caption = (
        "Compression against fp16, least and most over the contexts run: nominal (payload bits "
        "only, which is what was published) and stored (all bytes kept). "
        f"{described(rows, 'compression_ratio')}"
    )
    return Table("polykv_ratio", caption, columns, lines)


def _of(p: Point, names: Sequence[str]) -> tuple:
    return tuple(getattr(p, name) for name in names)


def minus(measured: Value, said: Value) -> Value:
    """The difference without an interval, or why one of the two is missing."""
    if measured.value is None or said.value is None:
        return Value(None, note=measured.note if measured.value is None else said.note)
    return Value(measured.value - said.value)


def described(rows: pd.DataFrame, *metrics: str) -> str:
    """What these metrics were measured on, for a caption."""
    return describe(rows[rows["metric"].isin(metrics) & rows["value"].notna()])


def decomposition(rows: pd.DataFrame) -> str | None:
    """How each published GB is computed: tokens x bytes per token x agents, or divided by the ratio for a pool.

    None where the models whose gigabytes are published were not run.
    """
    figures = [f for f in published.load("polykv") if f.table == "memory"]
    found, by_model = points(rows), grouped(figures, lambda f: f.model)
    if not any(published.same_model(model, p.model) for model in by_model for p in found):
        return None
    lines = ["# How the published GB decompose", ""]
    for model, mine in by_model.items():
        lines += _of_model(model, mine, found)
    return "\n".join(lines)


def _of_model(model: str, figures: Sequence[Figure], found: Sequence[Point]) -> list[str]:
    gigabytes = [f for f in figures if f.metric == "kv_memory"]
    g = load_group("model", model.removesuffix("-instruct")).geometry
    head_dim = g.hidden_size // g.num_attention_heads
    per_token = 2 * g.num_hidden_layers * g.num_key_value_heads * head_dim * 4
    ratio, of = _ratio(gigabytes, found)
    shares = span((f.prefilled_tokens / f.document_tokens for f in gigabytes), ".1%")
    said = (
        f"{model}: {per_token:,} bytes per token (keys and values of all layers and heads, in fp32); the pool is one "
        f"such cache over {ratio:.3f} ({of}). Only {shares} of each document is prefilled and counted."
    )
    lines = [textwrap.fill(said, WIDTH), ""]
    lines += [
        "| agents | cache | computed | GB | published GB |",
        "| --: | :-- | :-- | --: | --: |",
    ]
    for f in gigabytes:
        size = f"{f.prefilled_tokens:,} tokens x {per_token:,} B"
        gb = f.prefilled_tokens * per_token / 1e9
        if f.recipe == BASELINE:
            kind, rule, gb = "unshared", f"{f.n_agents} agents x {size}", gb * f.n_agents
        else:
            kind, rule, gb = "one pool", f"{size} / {ratio:.3f}", gb / ratio
        lines.append(f"| {f.n_agents} | {kind} | {rule} | {gb:.3f} | {f.value.value:.3f} |")
    lines.append("")
    for f in (f for f in figures if f.metric == "memory_reduction"):
        n, alone = f.n_agents, f.prefilled_tokens * per_token / 1e9
        said = (
            f"The published reduction of {f.value.value:g} % at {n} agents is 1 - 1 / ({n} x "
            f"{ratio:.3f}) = {1 - 1 / n / ratio:.1%}; sharing one uncompressed cache, without any "
            f"compression, gives {1 - 1 / n:.1%}. In fp16 the same row is {n * alone / 2:.3f} GB "
            f"unshared and {alone / 2 / ratio:.3f} GB pooled (nominal)."
        )
        answer = published.memory_answer(f, having(found, "stored"))
        if isinstance(answer, Point):
            kept = answer["stored"].value
            said += f" The pool really keeps (stored, measured) {kept:.3f} GB."
        lines += [textwrap.fill(said, WIDTH), ""]
    return lines


def _ratio(gigabytes: Sequence[Figure], found: Sequence[Point]) -> tuple[float, str]:
    """The ratio of PolyKV's recipe and where it is from: counted here, else implied by the largest published GB."""
    for p in having(found, "nominal_ratio"):
        if p.recipe == "polykv":
            return p["nominal_ratio"].value, "nominal: 16 bits over the recipe's mean payload bits"
    large = max((f for f in gigabytes if f.recipe == BASELINE), key=lambda f: f.value.value)
    size = (large.n_agents, large.prefilled_tokens)
    pools = (f for f in gigabytes if f.recipe != BASELINE)
    pool = next(f for f in pools if (f.n_agents, f.prefilled_tokens) == size)
    return large.value.value / large.n_agents / pool.value.value, "as the published GB imply"


@style.styled
def memory_agents(rows: pd.DataFrame) -> style.Picture | str | None:
    """One row of panels per model and context, one column per accounting, on one scale."""
    found = [p for p in having(points(rows), *ACCOUNTINGS) if p.n_agents and p.context_tokens]
    if not found:
        return None
    settings = grouped(found, lambda p: f"{p.run}, {p.context_tokens:,} tokens")
    shown = [name for name in ACCOUNTINGS if having(found, name)]
    width = style.PAGE if len(shown) > 1 else style.COLUMN
    canvas, panels = style.sheet(list(settings), len(shown), HEIGHT, width, share_y=True)
    looks, figures = looks_of(found), published.load("polykv")
    for axes, mine in zip(panels, settings.values(), strict=True):
        largest = max(p[name].value or 0 for p in mine for name in shown)
        unit, scale = ("GB", 1.0) if largest >= 0.1 else ("MB", 1e3)
        drawn = []
        for ax, name in zip(axes, shown, strict=True):
            ax.set_title(ACCOUNTINGS[name])
            of = having(mine, name)
            if not of:
                style.absent(ax, mine[0][name].note)
                continue
            # Only resident memory depends on who reads: the others have one line a recipe.
            for line, each in lines_of(of, by_reader=name == "resident").items():
                spots = sorted({p.n_agents: p[name].value * scale for p in each}.items())
                ax.plot(*zip(*spots, strict=True), label=line, **looks[line])
            agents_axis(ax, of, beside(figures, name, of), looks, scale)
            style.plain_log(ax)
            drawn.append(ax)
        drawn[0].tick_params(labelleft=True)
        drawn[0].set_ylabel(f"KV memory, {unit}")
    shows = "KV memory by number of agents and recipe"
    marks = style.Marks(panels=True, dashed=DASHED, more=open_markers(canvas, "paper", found))
    return style.picture(style.legend(canvas), shows, described(rows, "kv_memory"), marks)


def beside(figures: Iterable[Figure], measure: str, found: Sequence[Point]) -> list[Figure]:
    """The published figures that may be drawn beside these points."""
    return [f for f in figures if any(published.is_beside(f, measure, p) for p in found)]


def open_markers(canvas: Canvas, measure: str, found: Sequence[Point]) -> str:
    """What open markers are, or why none are drawn."""
    if not any(line.get_fillstyle() == "none" for ax in canvas.axes for line in ax.lines):
        return "Published figures are of other models or settings: not drawn, but in table published_polykv"
    models = (f.model for f in beside(published.load("polykv"), measure, found))
    return f"Open markers: published, on {' and '.join(dict.fromkeys(models))}"


def grouped(found: Iterable[Any], key: Callable[[Any], Key]) -> dict[Key, list]:
    """What was found by key, in order of appearance."""
    groups: dict[Key, list] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return groups


def lines_of(found: Sequence[Point], by_reader: bool = True) -> dict[str, list[Point]]:
    """Points by line: one per recipe, and if `by_reader` one more per recipe read in place, after the others.

    Where several backends read in place, each has one.
    """
    several = len({p.backend for p in found if p.reader == IN_PLACE}) > 1

    def line(p: Point) -> str:
        in_place = by_reader and p.reader == IN_PLACE
        return p.name + f" ({p.backend})" * (in_place and several) + SUFFIX * in_place

    return dict(sorted(grouped(found, line).items(), key=lambda of: of[0].endswith(SUFFIX)))


def looks_of(found: Sequence[Point]) -> dict[str, dict[str, object]]:
    """Look of each line of a figure, the same in every panel.

    Later recipes are thinner with smaller markers, so that coinciding lines all show.
    """
    names = (*lines_of(found, by_reader=False), *lines_of(found))
    recipes = list(dict.fromkeys(name.removesuffix(SUFFIX) for name in names))
    of_recipes, looks = style.looks(recipes), {}
    for place, recipe in enumerate(recipes):
        thin = max(0.35, 0.78**place)
        look = dict(zip(("color", "marker"), of_recipes[recipe], strict=True))
        look |= {"markersize": 6 * thin, "linewidth": 2.2 * thin}
        looks |= {recipe: look, recipe + SUFFIX: look | style.READ_IN_PLACE}
    return looks


def published_colour(recipe: str, looks: Mapping[str, Mapping[str, object]]) -> str:
    """The colour of a published recipe beside these lines."""
    recipes = [name for name in looks if not name.endswith(SUFFIX)]
    return style.colours([*recipes, recipe])[recipe]


def agents_axis(
    ax: Axes,
    found: Sequence[Point],
    figures: Sequence[Figure],
    looks: Mapping[str, Mapping[str, object]],
    scale: float = 1,
) -> None:
    """The numbers of agents below a panel, and published values times `scale` as open markers in it."""
    for recipe, mine in grouped(figures, lambda f: f.recipe).items():
        tint, at = published_colour(recipe, looks), [f.n_agents for f in mine]
        ax.plot(at, [f.value.value * scale for f in mine], marker="o", color=tint, **style.OPEN)
    ax.margins(x=0.08, y=0.12)
    style.number_ticks(ax, [x.n_agents for x in (*found, *figures)])
    ax.set_xlabel("agents")


def claims(rows: pd.DataFrame) -> list[Claim]:
    """One claim per weights that can decide it, or the command that would measure it."""
    figures, found = published.load("polykv"), points(rows)
    gigabytes = [f for f in figures if f.metric == "kv_memory" and f.n_agents == 15]
    return [
        _ratio_claim(next(f for f in figures if f.metric == "compression_ratio"), found),
        *(_gigabytes(f, having(found, "paper")) for f in gigabytes),
        *_resident(having(found, "resident")),
    ]


def _ratio_claim(f: Figure, found: Sequence[Point]) -> Claim:
    claim = f"the cache becomes {f.value.value:g} times smaller"
    mine = [p for p in having(found, "nominal_ratio") if p.recipe == f.recipe]
    if not mine:
        why = "No ratio was measured; run experiment=polykv_ratio."
        return claim_of("ratio", NOT_MEASURED, claim, why)
    nominal = mine[0]["nominal_ratio"].value
    stored = (p["stored_ratio"].value for p in having(mine, "stored_ratio"))
    verdict = AGREES if abs(nominal - f.value.value) < 0.005 else NOT_REPRODUCED
    said = f"16 bits over the mean payload bits of the recipe are {nominal:.3f}, computed, whatever the weights"
    if ends := span(stored, ".3f"):
        said += f"; measured, over every byte kept, it is {ends}"
    return claim_of("ratio", verdict, claim, f"{said}.")


def _gigabytes(f: Figure, found: Sequence[Point]) -> Claim:
    where = f"{f.n_agents} agents at {f.document_tokens:,} tokens ({f.policy})"
    claim = f"{f.value.value:g} GB for {where}"
    answer = published.memory_answer(f, found)
    if isinstance(answer, str):
        why = sentence(f"{answer}; run experiment=polykv_memory")
        return claim_of("memory", NOT_MEASURED, claim, why)
    same = abs(answer["paper"].value - f.value.value) < ROUNDING
    said = (
        f"The paper's accounting, worked back from its table (fp32, the prefilled part), gives "
        f"{answer['paper'].value:.3f} GB, computed from the geometry of {answer.model}"
    )
    if (kept := answer["stored"].value) is not None:
        said += f"; measured, every byte kept, it is {kept:.3f} GB"
    return claim_of("memory", AGREES if same else NOT_REPRODUCED, claim, f"{said}.")


def _resident(found: Sequence[Point]) -> list[Claim]:
    """Memory while all agents decode, by reader, at the largest number of agents of each model and weights."""
    claim = "agents that read one pool take less memory than agents with a cache each"
    unshared = [p for p in found if p.recipe == BASELINE and p.n_agents]
    claims = []
    for (model, weights), mine in grouped(unshared, lambda p: (p.model, p.weights)).items():
        # of several that are as large the last
        at = max(reversed(mine), key=lambda p: (p.n_agents, p.context_tokens or 0))
        gb = {"unshared": at["resident"].value}
        for p in (p for p in found if p.recipe == "polykv" and _of(p, CROWD) == _of(at, CROWD)):
            own = p["resident"].value
            gb[p.reader] = min(own, gb.get(p.reader, own))  # of several backends the best
        if "dequantize" not in gb:
            continue
        mb = {reader: f"{1e3 * size:.3g} MB" for reader, size in gb.items()}
        said = (
            f"Measured while {at.n_agents} agents decode after {at.context_tokens:,} tokens on {at.device}, "
            f"{at.dtype}: an unshared cache each {mb['unshared']}; one pool, which each rebuilds as published "
            f"(dequantize), {mb['dequantize']}"
        )
        if IN_PLACE in mb:
            said += f"; one pool that all attend to in place (in_place) {mb[IN_PLACE]}"
        saved = gb["dequantize"] < NOTICEABLE * gb["unshared"]
        on = f"{claim} (on {weights} weights of {model})"
        verdict = REPRODUCED if saved else NOT_REPRODUCED
        claims.append(claim_of("memory", verdict, on, f"{said}."))
    why = "Not measured; run experiment=polykv_memory."
    return claims or [claim_of("memory", NOT_MEASURED, claim, why)]


def sentence(said: str) -> str:
    """With a capital letter at the front and a full stop."""
    return f"{said[0].upper()}{said[1:]}."


TABLES = {"polykv_memory": polykv_memory, "polykv_ratio": polykv_ratio}
FIGURES = {"memory_agents": memory_agents}
TEXTS = {"polykv_memory_decomposition": decomposition}
CLAIMS = claims
