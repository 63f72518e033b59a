"""Causal controls of cards: the same receiver with the right card, the text, another card, and none.

If a card helps no more than another problem's card, its content has not helped.
"""

from collections.abc import Sequence

import pandas as pd

from analysis import style
from analysis.handoff_accuracy import (
    ALPHA,
    EXACT,
    FLEXIBLE,
    KL,
    PLAYED,
    STRICT,
    difference,
    verdicts,
)
from analysis.points import (
    RUN,
    cell_dtype,
    counted,
    groups,
    hops_text,
    ordered,
    over_seeds,
    run_text,
    settings_text,
)
from analysis.render import Column, Row, Table, describe, fixed, keys, settings_columns
from analysis.statistics import Value
from polykv.evaluation.statistics import detectable, holm, mcnemar

STUDY = "handoff_accuracy"
CONTROLS = ("other_card", "random_card", "no_card")
EXTRACTIONS = {"strict": STRICT, "flexible": FLEXIBLE}
# What a receiver gets, by policy; tables and figures have them in this order.
GIVEN = {
    "reprefill": "text",
    EXACT: "right card",
    "other_card": "another problem's card",
    "random_card": "card of random tokens",
    "no_card": "no card",
}
PLACE = ("document", "n_hops", "hop")
# Columns of the comparison with the right card, and what they say where there is none.
COMPARED = ("apart", "p", "detectable", "verdict")
ITSELF: Row = dict.fromkeys(COMPARED, Value(None, note="it is the right card"))
UNPAIRED: Row = dict.fromkeys(
    COMPARED, Value(None, note="the right card was not run on the same problems")
)


def table(rows: pd.DataFrame) -> Table | None:
    """Accuracy of the same receiver by what it was given, and the paired difference to the right card."""
    found = _of_controls(rows)
    lines: list[Row] = []
    for line, mine in groups(found, *RUN, *PLACE):
        line |= {"section": f"{run_text(line)}, {line['document']}", "hops": int(line["hop"])}
        compared = _pairs(mine)
        for policy, given in GIVEN.items():
            of = mine[mine["policy"] == policy]
            if of.empty:
                continue
            kl = over_seeds(of, KL.of)
            for how, measure in EXTRACTIONS.items():
                shown = {"given": given, "how": how, "right": over_seeds(of, measure.of), "kl": kl}
                none = ITSELF if policy == EXACT else UNPAIRED
                lines.append(line | shown | compared.get((policy, how), none))
    if not lines:
        return None
    columns = [
        *keys("hops", "how", "given"),
        *settings_columns(found),
        Column("right", "right % [95 %]", fixed(1), interval=True),
        Column("apart", "minus right card [95 %]", fixed(1, "+"), interval=True),
        Column("p", "p, Holm", fixed(4)),
        Column("detectable", "detectable", fixed(1)),
        Column("verdict", "against right card"),
        Column("kl", "KL to fp16 [95 %]", fixed(4), interval=True),
    ]
    explained = (
        "The same receivers and problems; cards are of fp16, so that nothing but their content differs. The controls "
        "state another problem (another problem's card) or none (no card, and that of as many random tokens as the "
        "right one has): unless the relay restates the problem (relay.restate), a receiver without the right card or "
        "the text has never seen it. minus right card: points of accuracy, with Agresti and Min's interval for pairs; "
        "p: McNemar's exact test, corrected for the comparisons of one run and extraction (Holm). detectable: the "
        "difference in points that so many problems show in 4 of 5 samples after that correction. If a card helps no "
        "more than another problem's card, its content has not helped"
    )
    caption = f"What the receiver was given. {describe(counted(found))}"
    return Table("handoff_controls", caption, columns, lines, explained)


def _of_controls(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows after a handoff under the policies of GIVEN, of runs in which a control was measured."""
    found = ordered(cell_dtype(rows, PLAYED))
    found = found[found["policy"].isin(GIVEN) & (found["hop"] > 0)]
    place = [*RUN, *PLACE]
    with_control = found.loc[found["policy"].isin(CONTROLS), place].drop_duplicates()
    return found.merge(with_control, on=place)


def _pairs(mine: pd.DataFrame) -> dict[tuple[str, str], Row]:
    """(policy, extraction) -> the comparison with the right card on the same problems, where both were run.

    Of several seeds, which may draw other problems, only the right card's last one is compared; a note says so.
    """
    found = verdicts(mine)
    several = found["seed"].nunique() > 1
    made: dict[tuple[str, str], Row] = {}
    for how in EXTRACTIONS:
        lines = found[found["extraction"] == how].to_dict("records")
        exact = next((line for line in reversed(lines) if line["policy"] == EXACT), None)
        if exact is None:
            continue
        others = {
            line["policy"]: line["right"]
            for line in lines
            if line["policy"] != EXACT and (line["seed"], line["n"]) == (exact["seed"], exact["n"])
        }
        tested = {name: mcnemar(own, exact["right"]) for name, own in others.items()}
        corrected = holm([p for *_, p in tested.values()])
        for (name, (more, fewer, _)), p in zip(tested.items(), corrected, strict=True):
            note = f"of seed {exact['seed']} alone" if several else ""
            own = others[name]
            least = detectable(len(own), more + fewer, ALPHA / len(tested))
            made[name, how] = _compared(own, exact["right"], least, p, note)
    return made


def _compared(
    own: Sequence[bool], exact: Sequence[bool], least: float | None, p: float, note: str
) -> Row:
    """The columns COMPARED; `least` is the smallest difference that shows, None if none does; `p` is corrected."""
    got, low, high = difference(own, exact)
    better = "better" if got > 0 else "worse"
    return {
        "apart": Value(got, low, high, note, len(own), "problems"),
        "p": Value(p),
        "detectable": Value(least and 100 * least, note="" if least else "no difference is, among so few"),
        "verdict": better if p < ALPHA else "no difference shown",
    }  # fmt: skip


@style.styled
def figure(rows: pd.DataFrame) -> style.Picture | str:
    """Strict and flexible accuracy by what the receiver was given."""
    found = _of_controls(rows)
    if found.empty:
        return "no control was run"
    runs = list(groups(found, *RUN, *PLACE))
    headings = [
        f"{run['model']} ({run['weights']} weights), {run['document']}; {hops_text(run['hop'])}{settings_text(run)}"
        for run, _ in runs
    ]
    canvas, panels = style.sheet(headings, 2, 1.6, share_y=True)
    for row, (_, mine) in zip(panels, runs, strict=True):
        given = [policy for policy in GIVEN if (mine["policy"] == policy).any()][::-1]
        for ax, (how, measure) in zip(row, EXTRACTIONS.items(), strict=True):
            for place, policy in enumerate(given):
                value = over_seeds(mine[mine["policy"] == policy], measure.of)
                if value.value is not None:
                    look = {"fmt": "o", "color": style.policy_colour(policy)}
                    ax.errorbar(value.value, place, xerr=style.reaches([value]), **look)
            ax.set_xlabel(f"accuracy ({how}), %")
            ax.set_xlim(left=0)
        row[0].set_yticks(range(len(given)), [GIVEN[policy] for policy in given])
    return style.picture(
        canvas,
        "accuracy of the same receiver by what it was given",
        describe(counted(found)),
        style.Marks(more="Paired tests: table handoff_controls."),
    )


TABLES = {"handoff_controls": table}
FIGURES = {"handoff_controls": figure}
