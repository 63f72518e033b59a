"""PolyKV's figures: which panels each has, and what it says when there is nothing to draw (draw.py draws)."""

import textwrap
from collections.abc import Callable, Hashable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas

from analysis import draw, published
from analysis.layout import COLUMN, PAGE, STYLE, absent, legend, sheet, styled
from analysis.published import Figure
from analysis.reduce import BASELINE, Point, having

Key = TypeVar("Key", bound=Hashable)
HEIGHT = 1.75  # inches of a panel
ACROSS = 2
TITLE = 48  # characters of a title above one of two panels
ACCOUNTINGS = {
    "paper": "paper accounting (fp32, computed)",
    "stored": "stored (bytes kept)",
    "resident": "resident (measured)",
}
# No date, no version: the same rows give the same files.
UNDATED = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}


@styled
def memory_agents(points: Sequence[Point], figures: Sequence[Figure]) -> Canvas | str:
    """One row per model and context, one column per accounting."""
    found = [p for p in having(points, *ACCOUNTINGS) if p.n_agents and p.context_tokens]
    if not found:
        return "no kv_memory rows with a number of agents"
    settings = _grouped(found, lambda p: (*_run(p), p.context_tokens))
    shown = [name for name in ACCOUNTINGS if having(found, name)]
    headings = [f"{_name(run)}, {context:,} tokens" for *run, context in settings]
    width = PAGE if len(shown) > 1 else COLUMN
    canvas, rows = sheet(headings, len(shown), HEIGHT, width, share_y=True)
    recipes = draw.recipes_of(found)
    for panels, mine in zip(rows, settings.values(), strict=True):
        largest = max(p[name].value or 0 for p in mine for name in shown)
        unit = "GB" if largest >= 0.1 else "MB"
        drawn = []
        for ax, name in zip(panels, shown, strict=True):
            ax.set_title(ACCOUNTINGS[name])
            if of := having(mine, name):
                beside = [f for f in figures if any(published.is_beside(f, name, p) for p in of)]
                drawn.append(draw.memory(ax, of, name, beside, recipes, unit))
            else:
                absent(ax, mine[0][name].note)
        drawn[0].tick_params(labelleft=True)
        for ax in drawn[1:]:
            ax.set_ylabel("")
    return legend(canvas)


@styled
def perplexity_context(points: Sequence[Point], figures: Sequence[Figure]) -> Canvas | str:
    """One panel per model and document."""
    found = [p for p in having(_compressed(points), "perplexity_delta") if p.context_tokens]
    if not found:
        return "no perplexity_delta rows of a compressed recipe"
    settings = _grouped(found, lambda p: f"{_name(_run(p))}\n{p.document}")
    return _wrapped(settings, draw.perplexity_delta, "perplexity_delta", figures)


@styled
def bertscore_agents(points: Sequence[Point], figures: Sequence[Figure]) -> Canvas | str:
    """One panel per model, document, context and scoring model in which a score differs from the others."""
    found = [p for p in having(_compressed(points), "bertscore_f1") if p.n_agents]
    if not found:
        return "no bertscore_f1 rows of a compressed recipe with a number of agents"

    def title(p: Point) -> str:
        length = f"{p.context_tokens:,} tokens" if p.context_tokens else "whole text"
        return f"{_name(_run(p))}\n{p.document}, {length}; scored by {p.scorer}"

    settings = _grouped(found, title)
    settings = {name: mine for name, mine in settings.items() if _differ(mine)}
    if not settings:
        return "every recipe's answers score 1.0000, as the uncompressed cache's do"
    return _wrapped(settings, draw.bertscore, "bertscore_f1", figures)


def save(canvas: Canvas, stem: Path, formats: Sequence[str]) -> list[Path]:
    """Write `stem`.png and/or .pdf: the same rows give the same bytes."""
    files = []
    with plt.style.context(STYLE):
        for kind in formats:
            files.append(stem.with_suffix(f".{kind}"))
            drawn = (
                BytesIO()
            )  # where a disk is full, matplotlib's PDF writer hides the error behind its own
            canvas.savefig(drawn, format=kind, metadata=UNDATED[kind])
            files[-1].write_bytes(drawn.getvalue())
    plt.close(canvas)
    return files


def _wrapped(
    settings: Mapping[str, list[Point]], panel: Callable, metric: str, figures: Sequence[Figure]
) -> Canvas:
    """One panel under each title, two beside each other; one alone fits a column."""
    across = min(ACROSS, len(settings))
    down = -(-len(settings) // across)
    canvas, rows = sheet([""] * down, across, HEIGHT + 0.3, PAGE if across > 1 else COLUMN)
    panels = [ax for row in rows for ax in row]
    for ax in panels[len(settings) :]:
        ax.remove()
    recipes = draw.recipes_of([p for mine in settings.values() for p in mine])
    for ax, (title, mine) in zip(panels, settings.items(), strict=False):
        beside = [f for f in figures if any(published.is_beside(f, metric, p) for p in mine)]
        panel(ax, mine, beside, recipes)
        ax.set_title("\n".join(textwrap.fill(line, TITLE) for line in title.split("\n")))
    return legend(canvas)


def _differ(points: Sequence[Point]) -> bool:
    """Whether, in the digits that tables give, a score is not that of the uncompressed cache's own answers."""
    return any(round(p["bertscore_f1"].value, 4) != 1 for p in points)


def _grouped(points: Sequence[Point], key: Callable[[Point], Key]) -> dict[Key, list[Point]]:
    found: dict[Key, list[Point]] = {}
    for p in points:
        found.setdefault(key(p), []).append(p)
    return found


def _compressed(points: Sequence[Point]) -> list[Point]:
    """The baseline's own delta is 0 and its BERTScore 1 by definition."""
    return [p for p in points if p.recipe != BASELINE]


def _run(p: Point) -> tuple[str, str, str, str]:
    return p.model, p.weights, p.device, p.dtype


def _name(setting: Sequence) -> str:
    model, weights, device, dtype = setting[:4]
    return f"{model} ({weights} weights), {device}, {dtype}"


FIGURES: dict[str, Callable[[Sequence[Point], Sequence[Figure]], Canvas | str]] = {
    "memory_agents": memory_agents,
    "perplexity_context": perplexity_context,
    "bertscore_agents": bertscore_agents,
}
