"""PolyKV's memory: the published GB and ratio beside the measured ones, how they come about, and its claims."""

import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from analysis import published, style
from analysis.catalog import AGREES, NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, Claim
from analysis.points import IN_PLACE, Point, having, points
from analysis.published import Figure
from analysis.render import Column, Row, Table, describe, fixed, keys, memory, span
from analysis.statistics import BASELINE, Value
from polykv.config import load_group

STUDY = ("polykv_memory", "compare")
NOT_PUBLISHED = Value(None, note="no published figure for this model, context and number of agents")
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
PER_GB = {"GB": 1.0, "MB": 1e3}
ROUNDING = 0.0005  # of the published GB
NOTICEABLE = 0.95  # of the memory: a repeat differs by a percent or two
of_paper = partial(Claim, "polykv")
Key = TypeVar("Key", bound=Hashable)


def polykv_memory(rows: pd.DataFrame) -> Table | None:
    """Published GB beside ours in the same accounting, and beside stored and resident memory; None without rows."""
    found = having(points(rows), *MEMORY)
    if not found:
        return None
    unshared = {_place(p): p for p in found if p.recipe == BASELINE}
    lines, answered = [], []
    for figure in published.load("polykv"):
        if figure.metric != "kv_memory":
            continue
        answer = published.memory_answer(figure, found)
        line = {"section": "published configurations", "model": figure.model}
        line |= {"context": figure.document_tokens, "agents": figure.n_agents}
        line |= {"recipe": figure.recipe, "published": figure.value}
        if isinstance(answer, str):
            line |= {n: Value(None, note=answer) for n in ("difference", "fp16", *MEMORY)}
            line["reader"] = "not stated"
        else:
            answered.append(answer)
            line |= _memory(answer, unshared.get(_place(answer)), figure.value)
        lines.append(line)
    for p in (p for p in found if p not in answered):
        line = {"section": "measured only", "model": p.model, "context": p.context_tokens}
        line |= {"agents": p.n_agents or "any", "recipe": p.name, "published": NOT_PUBLISHED}
        lines.append(line | _memory(p, unshared.get(_place(p)), NOT_PUBLISHED))
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


def _memory(p: Point, unshared: Point | None, said: Value) -> Row:
    """The measured columns; fp16 unshared is half the fp32 that the paper counts."""
    fp32 = unshared["paper"] if unshared else Value(None, note=f"no {BASELINE} row beside it")
    fp16 = Value(fp32.value / 2) if fp32.value is not None else fp32
    own = {name: p[name] for name in MEMORY}
    return own | {"reader": p.reader, "fp16": fp16, "difference": minus(p["paper"], said)}


def polykv_ratio(rows: pd.DataFrame) -> Table | None:
    """Nominal and stored ratio per recipe and head_dim beside the published 2.91; None without any."""
    found = having(points(rows), *RATIOS)
    if not found:
        return None
    said = next(f.value for f in published.load("polykv") if f.metric == "compression_ratio")
    lines = []
    for recipe, name, dim in dict.fromkeys((p.recipe, p.name, p.head_dim) for p in found):
        mine = [p for p in found if (p.name, p.head_dim) == (name, dim)]
        contexts = sorted({p.context_tokens or 0 for p in mine})
        line = {"recipe": name, "head_dim": dim}
        line["models"] = ", ".join(dict.fromkeys(p.model for p in mine))
        line["contexts"] = " and ".join(f"{context:,}" for context in contexts)
        line["published"] = said if recipe == "polykv" else Value(None, note="not published")
        for ratio in RATIOS:
            values = [p[ratio].value for p in mine if p[ratio].value is not None]
            line[f"{ratio}_low"] = Value(min(values)) if values else mine[0][ratio]
            line[f"{ratio}_high"] = Value(max(values)) if values else mine[0][ratio]
        line["difference"] = minus(line["nominal_ratio_low"], line["published"])
        lines.append(line)
    columns = [
        *keys("recipe", "head_dim", "models", "contexts"),
        Column("published", "published", fixed(2)),
        *_ends("nominal"),
        Column("difference", "difference", fixed(3, "+")),
        *_ends("stored"),
    ]
    caption = (
        "Compression against fp16, least and most over the contexts run: nominal (payload bits "
        "only, which is what was published) and stored (all bytes kept). "
        f"{described(rows, 'compression_ratio')}"
    )
    return Table("polykv_ratio", caption, columns, lines)


def _ends(ratio: str) -> list[Column]:
    ends = {"low": "least", "high": "most"}
    return [
        Column(f"{ratio}_ratio_{end}", f"{ratio}, {name}", fixed(3)) for end, name in ends.items()
    ]


def _place(p: Point) -> tuple:
    return p.model, p.weights, p.document, p.context_tokens, p.n_agents


def minus(measured: Value, said: Value) -> Value:
    if measured.value is None or said.value is None:
        return Value(None, note=measured.note if measured.value is None else said.note)
    return Value(measured.value - said.value)


def described(rows: pd.DataFrame, *metrics: str) -> str:
    return describe(rows[rows["metric"].isin(metrics) & rows["value"].notna()])


def decomposition(rows: pd.DataFrame) -> str | None:
    """How each published GB is computed: tokens x bytes per token x agents, or divided by the ratio for a pool.

    None where the models whose gigabytes are published were not run.
    """
    figures = [f for f in published.load("polykv") if f.table == "memory"]
    found = points(rows)
    models = dict.fromkeys(f.model for f in figures)
    if not any(published.same_model(model, p.model) for model in models for p in found):
        return None
    lines = ["# How the published GB decompose", ""]
    for model in models:
        mine = [f for f in figures if f.model == model]
        lines += _of_model(model, mine, found)
    return "\n".join(lines)


def _of_model(model: str, figures: Sequence[Figure], found: Sequence[Point]) -> list[str]:
    gigabytes = [f for f in figures if f.metric == "kv_memory"]
    per_token, (ratio, of) = _bytes_per_token(model), _ratio(gigabytes, found)
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
        lines += [_reduction(f, per_token, ratio, having(found, "stored")), ""]
    return lines


def _bytes_per_token(model: str) -> int:
    """Keys and values of all layers and heads in fp32, 4 bytes each, from the geometry in conf/model."""
    g = load_group("model", model.removesuffix("-instruct")).geometry
    head_dim = g.hidden_size // g.num_attention_heads
    return 2 * g.num_hidden_layers * g.num_key_value_heads * head_dim * 4


def _ratio(gigabytes: Sequence[Figure], found: Sequence[Point]) -> tuple[float, str]:
    for p in having(found, "nominal_ratio"):
        if p.recipe == "polykv":
            return p["nominal_ratio"].value, "nominal: 16 bits over the recipe's mean payload bits"
    large = max((f for f in gigabytes if f.recipe == BASELINE), key=lambda f: f.value.value)
    pool = next(
        f
        for f in gigabytes
        if f.recipe != BASELINE
        and (f.n_agents, f.prefilled_tokens) == (large.n_agents, large.prefilled_tokens)
    )
    return large.value.value / large.n_agents / pool.value.value, "as the published GB imply"


def _reduction(f: Figure, per_token: int, ratio: float, found: Sequence[Point]) -> str:
    """The published reduction: what sharing alone gives, and the same row at fp16 and as stored."""
    n, alone = f.n_agents, f.prefilled_tokens * per_token / 1e9
    said = (
        f"The published reduction of {f.value.value:g} % at {n} agents is 1 - 1 / ({n} x "
        f"{ratio:.3f}) = {1 - 1 / n / ratio:.1%}; sharing one uncompressed cache, without any "
        f"compression, gives {1 - 1 / n:.1%}. In fp16 the same row is {n * alone / 2:.3f} GB "
        f"unshared and {alone / 2 / ratio:.3f} GB pooled (nominal)."
    )
    answer = published.memory_answer(f, found)
    if isinstance(answer, Point):
        said += f" The pool really keeps (stored, measured) {answer['stored'].value:.3f} GB."
    return textwrap.fill(said, WIDTH)


@style.styled
def memory_agents(rows: pd.DataFrame) -> style.Picture | str | None:
    """One row of panels per model and context, one column per accounting, on one scale."""
    found = [p for p in having(points(rows), *ACCOUNTINGS) if p.n_agents and p.context_tokens]
    if not found:
        return None
    settings = grouped(found, lambda p: f"{run_of(p)}, {p.context_tokens:,} tokens")
    shown = [name for name in ACCOUNTINGS if having(found, name)]
    width = style.PAGE if len(shown) > 1 else style.COLUMN
    canvas, panels = style.sheet(list(settings), len(shown), HEIGHT, width, share_y=True)
    recipes, figures = recipes_of(found), published.load("polykv")
    for axes, mine in zip(panels, settings.values(), strict=True):
        largest = max(p[name].value or 0 for p in mine for name in shown)
        unit, drawn = "GB" if largest >= 0.1 else "MB", []
        for ax, name in zip(axes, shown, strict=True):
            ax.set_title(ACCOUNTINGS[name])
            if of := having(mine, name):
                near = beside(figures, name, of)
                drawn.append(_draw(ax, of, name, near, recipes, unit))
            else:
                style.absent(ax, mine[0][name].note)
        drawn[0].tick_params(labelleft=True)
        for ax in drawn[1:]:
            ax.set_ylabel("")
    shows = "KV memory by number of agents and recipe"
    marks = style.Marks(panels=True, dashed=DASHED, more=open_markers(canvas, "paper", found))
    return style.picture(style.legend(canvas), shows, described(rows, "kv_memory"), marks)


def _draw(
    ax: Axes,
    found: Sequence[Point],
    measure: str,
    figures: Sequence[Figure],
    recipes: Sequence[str],
    unit: str,
) -> Axes:
    """Memory in `unit` against agents, log y; `figures` (published kv_memory of this setting) as open markers.

    Only resident memory depends on who reads: the others have one line a recipe.
    """
    for name, mine in lines_of(found, by_reader=measure == "resident").items():
        line = sorted({p.n_agents: p[measure].value * PER_GB[unit] for p in mine}.items())
        ax.plot(*zip(*line, strict=True), label=name, **look_of(name, recipes))
    draw_published(ax, figures, recipes, PER_GB[unit])
    ax.margins(x=0.08, y=0.12)
    agents_axis(ax, found, figures)
    ax.set_ylabel(f"KV memory, {unit}")
    return style.plain_log(ax)


def beside(figures: Iterable[Figure], measure: str, found: Sequence[Point]) -> list[Figure]:
    """The published figures that may be drawn beside these points."""
    return [f for f in figures if any(published.is_beside(f, measure, p) for p in found)]


def open_markers(canvas: Canvas, measure: str, found: Sequence[Point]) -> str:
    """What open markers are, or why none are drawn."""
    if not any(line.get_fillstyle() == "none" for ax in canvas.axes for line in ax.lines):
        return "Published figures are of other models or settings: not drawn, but in table published_polykv"
    models = (f.model for f in beside(published.load("polykv"), measure, found))
    return f"Open markers: published, on {' and '.join(dict.fromkeys(models))}"


def grouped(found: Sequence[Point], key: Callable[[Point], Key]) -> dict[Key, list[Point]]:
    """The points by key, in order of appearance."""
    groups: dict[Key, list[Point]] = {}
    for p in found:
        groups.setdefault(key(p), []).append(p)
    return groups


def run_of(p: Point) -> str:
    """Model, weights, device and dtype as a heading."""
    return f"{p.model} ({p.weights} weights), {p.device}, {p.dtype}"


def draw_published(
    ax: Axes, figures: Sequence[Figure], recipes: Sequence[str], scale: float = 1
) -> None:
    """Open markers: published values times `scale` against agents."""
    for recipe in dict.fromkeys(f.recipe for f in figures):
        mine = [(f.n_agents, f.value.value * scale) for f in figures if f.recipe == recipe]
        ax.plot(
            *zip(*mine, strict=True), marker="o", color=colour_of(recipe, recipes), **style.OPEN
        )


def recipes_of(found: Sequence[Point]) -> list[str]:
    """The recipes in the whole figure, so that each has the same look in every panel."""
    names = (*lines_of(found, by_reader=False), *lines_of(found))
    return list(dict.fromkeys(name.removesuffix(SUFFIX) for name in names))


def look_of(name: str, recipes: Sequence[str]) -> dict[str, object]:
    """Look of a recipe's line; later ones are thinner with smaller markers, so that coinciding lines all show."""
    recipe = name.removesuffix(SUFFIX)
    thin = max(0.35, 0.78 ** recipes.index(recipe))
    look = {"color": colour_of(recipe, recipes), "marker": style.family(recipe)[2]}
    look |= {"markersize": 6 * thin, "linewidth": 2.2 * thin}
    return look | (style.READ_IN_PLACE if name.endswith(SUFFIX) else {})


def colour_of(recipe: str, recipes: Sequence[str]) -> str:
    """The recipe's colour among `recipes`."""
    return style.colours([*recipes, recipe])[recipe]


def lines_of(found: Sequence[Point], by_reader: bool = True) -> dict[str, list[Point]]:
    """Points by line: one per recipe, and if `by_reader` one more per recipe read in place, after the others.

    Where several backends read in place, each has one.
    """
    lines: dict[str, list[Point]] = {}
    several = len({p.backend for p in found if p.reader == IN_PLACE}) > 1
    for p in found:
        name = p.name
        if by_reader and p.reader == IN_PLACE:
            name += f" ({p.backend})" * several + SUFFIX
        lines.setdefault(name, []).append(p)
    return dict(sorted(lines.items(), key=lambda line: line[0].endswith(SUFFIX)))


def agents_axis(ax: Axes, found: Sequence[Point], figures: Sequence[Figure]) -> None:
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
        return of_paper("ratio", NOT_MEASURED, claim, why)
    nominal = mine[0]["nominal_ratio"].value
    stored = [p["stored_ratio"].value for p in mine]
    return of_paper(
        "ratio",
        AGREES if abs(nominal - f.value.value) < 0.005 else NOT_REPRODUCED,
        claim,
        f"16 bits over the mean payload bits of the recipe are {nominal:.3f}, computed, whatever the "
        f"weights; measured, over every byte kept, it is {span(stored, '.3f')}.",
    )


def _gigabytes(f: Figure, found: Sequence[Point]) -> Claim:
    where = f"{f.n_agents} agents at {f.document_tokens:,} tokens ({f.policy})"
    claim = f"{f.value.value:g} GB for {where}"
    answer = published.memory_answer(f, found)
    if isinstance(answer, str):
        why = sentence(f"{answer}; run experiment=polykv_memory")
        return of_paper("memory", NOT_MEASURED, claim, why)
    same = abs(answer["paper"].value - f.value.value) < ROUNDING
    kept = answer["stored"].value
    every_byte = "" if kept is None else f"; measured, every byte kept, it is {kept:.3f} GB"
    return of_paper(
        "memory",
        AGREES if same else NOT_REPRODUCED,
        claim,
        f"The paper's accounting, worked back from its table (fp32, the prefilled part), gives "
        f"{answer['paper'].value:.3f} GB, computed from the geometry of {answer.model}{every_byte}.",
    )


def _resident(found: Sequence[Point]) -> list[Claim]:
    """Memory while all agents decode, by reader, at the largest number of agents of each model and weights."""
    claim = "agents that read one pool take less memory than agents with a cache each"
    most: dict[tuple[str, str], Point] = {}
    for p in found:
        key = (p.model, p.weights)
        if p.recipe == BASELINE and p.n_agents and _crowd(p) >= _crowd(most.get(key, p)):
            most[key] = p
    lines = []
    for (model, weights), unshared in most.items():
        readers: dict[str, float] = {}  # of several backends the best
        for p in (p for p in found if _same_crowd(p, unshared)):
            taken = p["resident"].value
            readers[p.reader] = min(taken, readers.get(p.reader, taken))
        if "dequantize" in readers:
            on = f"{claim} (on {weights} weights of {model})"
            lines.append(_reader_by_reader(on, unshared, readers))
    why = "Not measured; run experiment=polykv_memory."
    return lines or [of_paper("memory", NOT_MEASURED, claim, why)]


def _reader_by_reader(claim: str, unshared: Point, readers: Mapping[str, float]) -> Claim:
    theirs = unshared["resident"].value
    said = f"an unshared cache each {1e3 * theirs:.3g} MB; one pool, which each rebuilds as published (dequantize), "
    said += f"{1e3 * readers['dequantize']:.3g} MB"
    if "in_place" in readers:
        said += (
            f"; one pool that all attend to in place (in_place) {1e3 * readers['in_place']:.3g} MB"
        )
    where = f"{unshared.n_agents} agents decode after {unshared.context_tokens:,} tokens on {unshared.device}, "
    where += unshared.dtype
    saved = readers["dequantize"] < NOTICEABLE * theirs
    verdict = REPRODUCED if saved else NOT_REPRODUCED
    return of_paper("memory", verdict, claim, f"Measured while {where}: {said}.")


def _crowd(p: Point) -> tuple[int, int]:
    return p.n_agents, p.context_tokens or 0


def _same_crowd(p: Point, other: Point) -> bool:
    names = ("model", "weights", "dtype", "device", "document", "context_tokens", "n_agents")
    return p.recipe == "polykv" and all(getattr(p, n) == getattr(other, n) for n in names)


def sentence(said: str) -> str:
    return f"{said[0].upper()}{said[1:]}."


TABLES = {"polykv_memory": polykv_memory, "polykv_ratio": polykv_ratio}
FIGURES = {"memory_agents": memory_agents}
TEXTS = {"polykv_memory_decomposition": decomposition}
CLAIMS = claims
