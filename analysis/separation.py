"""Table and figure of `recipe_separation`: what each recipe costs on the reference model's evaluation set."""

from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")  # files only, no window

import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure as Canvas  # noqa: E402

from analysis.figures import STYLE  # noqa: E402
from analysis.frontier import of_experiment, settings, values  # noqa: E402
from analysis.reduce import BASELINE, Value, describe  # noqa: E402
from analysis.render import Column, Row, Table, fixed, significant  # noqa: E402

EXPERIMENT = "recipe_separation"
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
        Column("recipe", "recipe", key=True),
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


def draw_separation(rows: pd.DataFrame) -> Canvas | None:
    """KL divergence and problems lost, against stored bits; one line per context."""
    rows = of_experiment(rows, EXPERIMENT)
    found = settings(rows)
    if not found:
        return None
    with plt.style.context(STYLE):
        canvas = plt.figure(figsize=(9, 3.8))
        left, right = canvas.subplots(1, 2)
        for place, (setting, mine) in enumerate(found):
            of_recipe = _by_recipe(mine)
            changes = {
                recipe: _value(part, "exact_match_change", "problems")
                for recipe, part in mine.groupby("recipe")
            }
            label, tint = f"{setting.context:,} tokens", f"C{place}"
            _line(left, of_recipe, {r: f["kl_mean"] for r, f in of_recipe.items()}, label, tint)
            _line(right, of_recipe, changes, label, tint)
        for recipe in set(changes) - {*WIDTHS, BASELINE}:  # named once, at the last context
            spot = of_recipe[recipe]["stored_bits"].value, changes[recipe].value
            right.annotate(recipe, spot, (6, -10), textcoords="offset points", fontsize=7)
        left.set_yscale("log")
        left.set_ylabel("mean KL divergence, nats")
        right.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        right.set_ylabel("document problems right,\npoints against the full cache")
        left.legend(fontsize=7)
        for ax in (left, right):
            ax.set_xlabel("stored bits per value")
        text = "Lines: absmax at 8, 4, 3 and 2 bits. Crosses: other recipes. Bars: 95 % over documents."
        canvas.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color="0.3")
    return canvas


def _line(
    ax: Axes, of_recipe: dict[str, dict], shown: dict[str, Value], label: str, tint: str
) -> None:
    for names, form in ((WIDTHS, "o-"), (sorted(set(shown) - {*WIDTHS, BASELINE}), "x")):
        spots = [(of_recipe[n]["stored_bits"].value, shown[n]) for n in names if n in shown]
        if spots:
            ends = [[v.value - v.low, v.high - v.value] for _, v in spots]
            ax.errorbar(
                [bits for bits, _ in spots],
                [v.value for _, v in spots],
                yerr=list(zip(*ends, strict=True)),
                fmt=form,
                color=tint,
                capsize=2.5,
                label=label if form == "o-" else None,
            )


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
