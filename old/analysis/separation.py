"""Table and figure of `recipe_separation`: what each recipe costs on the reference model's evaluation set."""

from collections.abc import Callable

import pandas as pd
from analysis.colours import BLUE, GREEN, MARKERS, ORANGE, VERMILION
from analysis.draw import reaches
from analysis.frontier import Setting, of_experiment, settings, values
from analysis.layout import legend, sheet, styled
from analysis.reduce import BASELINE, Value, describe
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from analysis.render import Column, Row, Table, fixed, keys, significant

EXPERIMENT = "recipe_separation"
NEUTRAL = "0.3"  # the colour of what holds for every context
GROUPS = ("questions", "problems")
WIDTHS = ("int8_token", "uniform", "uniform_3bit", "uniform_2bit")  # one method at 8, 4, 3, 2 bits


def recipe_separation(rows: pd.DataFrame) -> Table | None:
    """Divergence, perplexity and answers of every recipe, by context."""
    rows = of_experiment(rows, EXPERIMENT)
    lines = []
    for setting, mine in settings(rows):
        by_bits = sorted(_by_recipe(mine).items(), key=lambda item: -item[1]["stored_bits"].value)
        for recipe, found in by_bits:
            line = {"section": str(setting), "recipe": recipe, "bits": found["stored_bits"]}
            line |= {name: found[name] for name in ("kl_mean", "perplexity_delta")}
            line["restated"] = found["restated_value_perplexity"]
            lines.append(line | _answers(mine[mine["recipe"] == recipe]))
    columns = [
        *keys("recipe"),
        Column("bits", "stored bits", fixed(3)),
        Column("kl_mean", "KL mean [95 %]", significant, interval=True),
        Column("perplexity_delta", "Δppl % [95 %]", fixed(2, "+"), interval=True),
        Column("restated", "ppl, restated values", fixed(3)),
    ]
    for group in GROUPS:
        columns += [
            Column(f"{group}_exact", f"{group} right % [95 %]", fixed(1), interval=True),
            Column(f"{group}_change", "points lost or won [95 %]", fixed(1, "+"), interval=True),
            Column(f"{group}_moved", "answers lost, won"),
            Column(f"{group}_p", "McNemar p", significant),
        ]
    caption = (
        "The reference model's fixed evaluation set read from each recipe's cache: divergence and perplexity "
        "on the rest of each document, and teacher-forced exact match of whole answers, paired with the full "
        f"cache's by McNemar's exact test. {describe(rows)}"
    )
    return Table(EXPERIMENT, caption, columns, lines) if lines else None


@styled
def draw_separation(rows: pd.DataFrame) -> Canvas | None:
    """KL divergence and problems lost, against stored bits; one line per context."""
    rows = of_experiment(rows, EXPERIMENT)
    found = settings(rows)
    if not found:
        return None
    contexts = " and ".join(f"{setting.context:,}" for setting, _ in found)
    first = found[0][0]
    heading = f"{first.model} ({first.weights} weights), {first.document}, {contexts} tokens"
    canvas, [(left, right)] = sheet([heading], 2, 2.6)
    kl, lost = {}, {}
    for setting, mine in found:
        of_recipe = _by_recipe(mine)
        bits = {name: values["stored_bits"].value for name, values in of_recipe.items()}
        kl[setting] = {r: (bits[r], v["kl_mean"]) for r, v in of_recipe.items() if r != BASELINE}
        lost[setting] = {
            recipe: (bits[recipe], _value(part, "exact_match_change", "problems"))
            for recipe, part in mine.groupby("recipe")
            if recipe != BASELINE
        }
    left.set_yscale("log")
    left.set_ylabel("mean KL divergence, nats")
    right.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    right.set_ylabel("document problems right,\npoints against the full cache")
    for ax, spots in ((left, kl), (right, lost)):
        ax.margins(x=0.12, y=0.12)
        ax.set_xlabel("stored bits per value")
        _lines(ax, spots)
    return legend(canvas)


def _lines(ax: Axes, spots: dict[Setting, dict[str, tuple[float, Value]]]) -> None:
    """One colour a context: a line through one method's widths, and a marker for each other recipe."""
    others = sorted({name for mine in spots.values() for name in mine} - {*WIDTHS})
    forms = {name: MARKERS[place % len(MARKERS)] for place, name in enumerate(others)}
    for (setting, mine), tint in zip(spots.items(), (BLUE, ORANGE, GREEN, VERMILION), strict=False):
        widths = [mine[name] for name in WIDTHS if name in mine]
        context = f"{setting.context:,} tokens"
        for form, drawn in (
            (".-", widths), *((forms[name], [mine[name]]) for name in others if name in mine)
        ):  # fmt: skip
            if drawn:
                ax.errorbar(
                    [bits for bits, _ in drawn], [v.value for _, v in drawn],
                    yerr=reaches([v for _, v in drawn]), fmt=form, color=tint,
                    label=context if drawn is widths else None,
                )  # fmt: skip
    for name, form in forms.items():
        ax.plot([], [], form, color=NEUTRAL, label=name)


def _by_recipe(rows: pd.DataFrame) -> dict[str, dict[str, Value]]:
    return {recipe: values(part) for recipe, part in rows.groupby("recipe")}


def _answers(rows: pd.DataFrame) -> Row:
    line = {}
    for group in GROUPS:
        exact = _value(rows, "exact_match", group)
        line[f"{group}_exact"] = Value(100 * exact.value, 100 * exact.low, 100 * exact.high)
        line[f"{group}_change"] = _value(rows, "exact_match_change", group)
        lost, won = (_value(rows, f"answers_{name}", group).value for name in ("lost", "won"))
        line[f"{group}_moved"] = f"{lost:.0f}, {won:.0f}"
        line[f"{group}_p"] = _value(rows, "mcnemar_p", group)
    return line


def _value(rows: pd.DataFrame, metric: str, group: str) -> Value:
    return values(rows[rows["protocol"].str.startswith(f"{group};", na=False)])[metric]


SEPARATION_TABLES: dict[str, Callable[[pd.DataFrame], Table | None]] = {
    EXPERIMENT: recipe_separation
}
SEPARATION_FIGURES: dict[str, Callable[[pd.DataFrame], Canvas | None]] = {
    EXPERIMENT: draw_separation
}
