"""QKVShare's answers: accuracy by handoffs, policies in pairs, and whether its two claims on accuracy hold."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import NormalDist

import pandas as pd
from matplotlib.axes import Axes

from analysis import published, style
from analysis.catalog import INCONCLUSIVE, NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, Claim
from analysis.load import SETTING, swept
from analysis.points import (
    RUN,
    bits_text,
    cell_dtype,
    counted,
    groups,
    hops_text,
    less,
    ordered,
    over_seeds,
    run_text,
    settings_text,
)
from analysis.published import judged_runs, with_budget
from analysis.render import Column, Row, Table, describe, fixed, keys, settings_columns
from analysis.statistics import Measure, Value, mean_of_samples, percentage, rate, within
from polykv.evaluation.statistics import detectable, holm, mcnemar

RELAY = ("document", "n_hops", "hop", "budget_bits", "policy", "reseal")
# Metrics of the relays as they were played, in the dtype of answers; the others are of replays.
PLAYED = (
    "answer_right", "several_marks", "empty_answer", "unfinished_answer", "mean_bits", "file_bits",
    "relay_minutes",
)  # fmt: skip
EXACT = "fp16"  # the policy that the others are compared with
CARD = "topology"  # the policy of a QKVShare card
# Points of accuracy: to hold is to rule out a greater loss. Our choice, none is published.
LOSS = 5.0
ALPHA = 0.05
DODGE = 0.09  # handoffs between policies at one place of x, so that bars do not hide each other
KL = Measure("kl", reduce=within(0, math.inf, mean_of_samples))
STRICT = Measure("answer_right", {"extraction": "strict"}, rate, percentage)
# Drawn, since some chat models never write the #### that STRICT wants.
FLEXIBLE = Measure("answer_right", {"extraction": "flexible"}, rate, percentage)
FLIPS = Measure("digit_flip", reduce=rate, form=percentage)
MEASURES = {
    "strict": STRICT,
    "flexible": FLEXIBLE,
    "kl": KL,
    "working": Measure("depth_working", reduce=mean_of_samples),
    "passing": Measure("depth_passing", reduce=mean_of_samples),
    "same_top1": Measure("same_top1", reduce=within(0, 1, mean_of_samples)),
    "flips": FLIPS,
    "bits": Measure("mean_bits", reduce=mean_of_samples),
    "file_bits": Measure("file_bits", reduce=mean_of_samples),
    "relay_minutes": Measure("relay_minutes"),
    "replay_minutes": Measure("replay_minutes"),
}
COLUMNS = (
    Column("published", "published %", fixed(2)),
    Column("strict", "strict % [95 %]", fixed(1), interval=True),
    Column("flexible", "flexible % [95 %]", fixed(1), interval=True),
    Column("kl", "KL to fp16 [95 %]", fixed(5), interval=True),
    Column("working", "depth, working [95 %]", fixed(5, "+"), interval=True),
    Column("passing", "depth, passing [95 %]", fixed(5, "+"), interval=True),
    Column("same_top1", "same top-1", fixed(4)),
    Column("flips", "digit flipped % [95 %]", fixed(1), interval=True),
    Column("bits", "bits stored", fixed(3)),
    Column("file_bits", "bits of the file", fixed(3)),
    Column("relay_minutes", "min, relays", fixed(1)),
    Column("replay_minutes", "min, replays", fixed(1)),
)

# What the caption says of a column that has values; under "" what it always says.
EXPLAINED = {
    "": "hop: handoffs before the answer, of n_hops; the paper's hops are taken as handoffs. A budget is nominal, as "
    "its Q4 and Q8 are: payload bits, without metadata.",
    "strict": "strict: the number after ####; flexible: the last number; both with Wilson interval.",
    "kl": "KL: to the fp16 relay, on the answer after the handoffs, teacher-forced.",
    "working": "Depth, of the relay's last answer: that KL less the one where only the last of the handoffs takes "
    "place; working: the agents between wrote their turns on caches that were handed to them; passing: they only "
    "passed the card on, which changes nothing where cards are appended to.",
    "flips": "digit flipped: of the replayed answers with digits, those in which one would be another; with Wilson "
    "interval.",
    "bits": "Bits: mean stored bits per value of the card handed on: of its tensors with scales, maps and token ids, "
    "and of its file with the header of fixed size.",
    "replay_minutes": "min: minutes for the relays of all problems, and for their replays, beside whatever else the "
    "machine did; the first agents' turns are the same under every policy, and one cell of a process makes and counts "
    "them.",
}


def with_depth(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows in order, with `depth_working`, `depth_passing`: KL after all handoffs less KL after the last alone."""
    rows = cell_dtype(rows, PLAYED)
    last = rows[rows["hop"] == rows["n_hops"]]
    once = last[last["metric"] == "kl_once"]
    deep = {"depth_working": "kl", "depth_passing": "kl_passing"}
    added = [less(last[last["metric"] == own], once, metric) for metric, own in deep.items()]
    return ordered(pd.concat([rows, *(part for part in added if len(part))]))


def table(rows: pd.DataFrame) -> Table:
    """Accuracy after each handoff, published and measured, with KL to the fp16 relay and the bits stored."""
    found = with_depth(rows)
    lines = [_published(found, said) for said in _accuracies()]
    none = Value(None, note="not published for this model and problems")
    for line, mine in groups(found, *RUN, *RELAY):
        line |= {"section": f"measured on {run_text(line)}", "published": none}
        lines.append(_keys(line) | _figures(mine))
    columns = [
        *keys("problems", "hop", "hops", "policy", "budget", "reseal"),
        *settings_columns(found),
        *COLUMNS,
    ]
    shown = {name for name in MEASURES if any(line[name].value is not None for line in lines)}
    explained = " ".join(said for name, said in EXPLAINED.items() if not name or name in shown)
    caption = f"Answers after a relay. {describe(counted(found))}"
    return Table("handoff_accuracy", caption, columns, lines, explained)


def _accuracies() -> list[published.Figure]:
    return [f for f in published.load("qkvshare") if f.metric == "gsm8k_accuracy"]


def _published(found: pd.DataFrame, said: published.Figure) -> Row:
    policy, bits = said.controller
    mine = found[(found["document"] == "gsm8k") & (found["policy"] == policy)]
    mine = mine[published.of_model(mine, said.model) & with_budget(mine, bits)]
    mine = mine[mine["hop"] == int(said.at)]
    mine = mine[mine["n_hops"] == mine["n_hops"].max()]
    reseal = mine["reseal"].iloc[0] if len(mine) else "not stated"
    line = {"document": "gsm8k", "policy": policy, "hop": said.at, "budget_bits": bits}
    line |= {"section": f"published on {said.model}", "published": said.value, "reseal": reseal}
    line["n_hops"] = mine["n_hops"].iloc[0] if len(mine) else None
    absent = f"{published.NOT_HERE}{said.model} on gsm8k"
    return _keys(line) | _figures(mine[mine["reseal"] == reseal], absent)


def _keys(line: Row) -> Row:
    return line | {
        "problems": line["document"],
        "hop": int(line["hop"]),
        "hops": "not stated" if line["n_hops"] is None else int(line["n_hops"]),
        "budget": bits_text(line["budget_bits"]),
    }


def _figures(mine: pd.DataFrame, absent: str = "") -> Row:
    if mine.empty:
        return dict.fromkeys(MEASURES, Value(None, note=absent))
    return {name: over_seeds(mine, measure.of) for name, measure in MEASURES.items()}


def verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per relay, policy, seed and extraction, from the newest cell: `right` by problem; `n`: how many."""
    found = cell_dtype(rows, PLAYED)
    found = found[found["metric"] == "answer_right"].sort_values("sample", kind="stable")
    of_answers = [name for name in swept(rows) if name != SETTING + "n_forced"]  # of replays alone
    about = [*RUN, *RELAY, *of_answers, "extraction", "seed"]
    cells = found.groupby([*about, "created_at", "cell"], dropna=False)["value"]
    lists = cells.agg(lambda values: [*(values == 1)]).rename("right").reset_index()
    lists = ordered(lists.assign(n=lists["right"].map(len)))
    return lists.drop_duplicates([*about, "n"], keep="last")


def pairs(rows: pd.DataFrame) -> Table | None:
    """McNemar's exact test for every pair of policies at equal budget, handoffs and resealing, and each with fp16."""
    found = verdicts(rows)
    found = found[found["extraction"].isin(("strict", "flexible")) & (found["hop"] > 0)]
    same = (*RUN, "document", "n_hops", "hop", "extraction", "seed", "n")
    several = found["seed"].nunique() > 1
    lines = []
    for line, group in _with_fp16(found, same):
        line = _keys(line) | {"how": line["extraction"]}
        line["section"] = f"{run_text(line)}, {line['document']}"
        line["section"] += f", seed {line['seed']}" * several
        for one, other in combinations(group.to_dict("records"), 2):
            only_one, only_other, p = mcnemar(one["right"], other["right"])
            least = detectable(len(one["right"]), only_one + only_other)
            note = "" if least else "no difference is, among so few"
            tested = {"only_one": only_one, "only_other": only_other, "p": Value(p)}
            tested["detectable"] = Value(least and 100 * least, note=note)
            lines.append(line | {"one": one["policy"], "other": other["policy"]} | tested)
    if not lines:
        return None
    columns = [
        *keys("hop", "hops", "budget", "reseal", "how", "one", "other"),
        *settings_columns(found),
        Column("n", "problems"),
        Column("only_one", "right by one only"),
        Column("only_other", "right by other only"),
        Column("p", "p, exact", fixed(4)),
        Column("detectable", "detectable", fixed(1)),
    ]
    caption = (
        "Policies in pairs: McNemar's exact test on the same problems, every pair at equal nominal bits, hops and "
        f"resealing, and each policy with fp16; not corrected for the number of pairs ({len(lines)}); detectable: the "
        "difference in points that so many problems show in 4 of 5 samples at p < 0.05. "
        f"{describe(counted(rows))}"
    )
    return Table("handoff_pairs", caption, columns, lines)


def _with_fp16(found: pd.DataFrame, same: Sequence[str]) -> Iterator[tuple[Row, pd.DataFrame]]:
    """(setting, verdicts) of the policies of one budget and resealing, with those of fp16, which has neither."""
    for about, mine in groups(found, *same):
        exact = mine[mine["policy"] == EXACT]
        for line, group in groups(mine, "budget_bits", "reseal"):
            has_budget = line["budget_bits"] is not None
            yield about | line, pd.concat([exact, group]) if has_budget else group


@style.styled
def figure(rows: pd.DataFrame) -> style.Picture | str:
    """KL to the fp16 relay, and flexible accuracy beside its own, by handoffs; panels for each budget and resealing."""
    place = [*RUN, "document", "n_hops"]
    found = ordered(cell_dtype(rows, PLAYED))
    exact = found[found["policy"] == EXACT]
    judged = found.loc[found["metric"] == FLEXIBLE.metric, "cell"]
    found = found[found["budget_bits"].notna() & found["cell"].isin(judged)]
    if found.empty:
        return "no answers under a policy with a budget were judged"
    runs = list(groups(found, *place, "budget_bits", "reseal"))
    headings = [
        f"{run['model']} ({run['weights']} weights), {run['document']}; {run['budget_bits']:g} bits, {run['reseal']}, "
        f"{hops_text(run['n_hops'])}{settings_text(run)}"
        for run, _ in runs
    ]
    canvas, panels = style.sheet(headings, 2, 1.75)
    for (left, right), (_, mine) in zip(panels, runs, strict=True):
        if all(value.value > 0 for value in _by_hop(left, mine[mine["hop"] > 0], KL)):
            left.set_yscale("log")
        left.set_ylabel("KL to fp16 relay, nats")
        same = (exact[place] == mine[place].iloc[0]).all(axis=1)
        _by_hop(right, pd.concat([exact[same], mine]), FLEXIBLE)
        _published_beside(right, mine)
        right.set_ylabel("accuracy (flexible), %")
        right.set_ylim(0, 103)
    return style.picture(
        style.legend(canvas),
        "KL divergence to the fp16 relay, and accuracy (the last number is right), by handoffs and policy",
        describe(counted(found)),
        style.Marks(
            dashed="the fp16 relay itself",
            dotted=f"published under the policy of this colour, on {_accuracies()[0].model}",
            more="Tests of pairs: table handoff_pairs; published accuracies: table published_qkvshare.",
        ),
    )


def _by_hop(ax: Axes, mine: pd.DataFrame, measure: Measure) -> list[Value]:
    """Draw one line with intervals per policy, dashed for fp16; return all values."""
    lines = {
        policy: [(int(n), over_seeds(of, measure.of)) for n, of in line.groupby("hop")]
        for policy, line in mine.groupby("policy", sort=False)
    }
    lines = {
        policy: spots
        for policy, spots in lines.items()
        if any(v.value is not None for _, v in spots)
    }
    drawn = []
    for place, (policy, spots) in enumerate(lines.items()):
        shift = DODGE * (place - (len(lines) - 1) / 2)
        exact = policy == EXACT
        look = {"linestyle": "--" if exact else "-", "zorder": 3 if exact else 2}
        look |= {"color": style.policy_colour(policy), "elinewidth": 0.8, "markersize": 3}
        at = [(n + shift, value) for n, value in spots]
        drawn += style.series(ax, at, fmt="o", label=policy, **look)
    style.number_ticks(ax, set(mine["hop"]))
    ax.set_xlim(int(mine["hop"].min()) - 0.5, int(mine["hop"].max()) + 0.5)
    ax.set_xlabel("handoffs")
    return drawn


def _published_beside(ax: Axes, mine: pd.DataFrame) -> None:
    """Draw the published accuracies of fp16 and of these policies, at their budget and after these handoffs."""
    if mine["document"].iloc[0] != "gsm8k":
        return
    bits = mine["budget_bits"].iloc[0]
    for policy in (EXACT, *mine["policy"].unique()):
        wanted = (policy, None if policy == EXACT else bits)
        said = {int(f.at): f.value.value for f in _accuracies() if f.controller == wanted}
        at = sorted(hop for hop in said if hop <= mine["hop"].max())
        look = {"color": style.policy_colour(policy), **style.OPEN}
        look |= {"marker": "o", "markersize": 4, "linestyle": ":"}
        if at:
            ax.plot(at, [said[hop] for hop in at], **look)


Answers = tuple[str, list[bool], list[bool]]  # setting, verdicts of the card and of the other
UNDECIDED = "; more problems (n_problems=) would tell"


def claims(rows: pd.DataFrame) -> list[Claim]:
    """One claim per run (weights, problems, device) with answers, or the command that would measure it."""
    said = [f for f in _accuracies() if f.controller[0] == CARD]
    hops, model = sorted({int(f.at) for f in said}), said[0].model.removesuffix("-instruct")
    answers = verdicts(rows) if len(rows) else rows
    if len(answers):
        in_range = answers["hop"].between(hops[0], hops[-1])
        answers = answers[(answers["extraction"] == "flexible") & in_range]
    run = f"experiment=handoff_accuracy model={model} relay=gsm8k"
    digest = ", as a secondary digest of the paper has it"
    holds = f"accuracy holds over {hops[0]} to {hops[-1]} hops{digest}"
    better = f"topology-aware cards answer better than uniform ones{digest}"
    return [
        *judged_runs("accuracy", holds, run, answers, _holds),
        *judged_runs("accuracy", better, run, answers, _better),
    ]


def _holds(mine: pd.DataFrame) -> tuple[str, str]:
    """Accuracy against fp16 cards on the same problems, so that the cost of depth itself cancels."""
    found = _against(mine, EXACT)
    if not found:
        return NOT_MEASURED, "No card was run beside fp16; run experiment=handoff_accuracy."
    apart = {what: difference(card, other) for what, card, other in found}
    worst = min(apart, key=lambda what: apart[what][1])
    got, low, high = apart[worst]
    lost = [sure for sure in _significant(found) if sure < 0]
    said = (
        f"Against fp16 on {_span(found)}: at worst {got:+.1f} points [{low:+.1f}, {high:+.1f}] ({worst}); {len(lost)} "
        f"of {len(found)} comparisons are a significant loss (McNemar, Holm)"
    )
    if lost:
        return NOT_REPRODUCED, f"{said}."
    if low > -LOSS:
        return (
            REPRODUCED,
            f"{said}, and a loss of more than {LOSS:g} points is ruled out in each (95 %).",
        )
    return INCONCLUSIVE, f"{said}, but a loss of {LOSS:g} points is not ruled out{UNDECIDED}."


def _better(mine: pd.DataFrame) -> tuple[str, str]:
    found = _against(mine, "uniform")
    if not found:
        return NOT_MEASURED, "No topology-aware card was run beside a uniform one of equal bits."
    sure = _significant(found)
    wins, losses = sum(apart > 0 for apart in sure), sum(apart < 0 for apart in sure)
    said = (
        f"On {_span(found)}: significantly better in {wins} and worse in {losses} of {len(found)} comparisons "
        "(McNemar, Holm)"
    )
    if bool(wins) == bool(losses):
        return INCONCLUSIVE, f"{said}{UNDECIDED}."
    return (REPRODUCED if wins else NOT_REPRODUCED), f"{said}."


def _against(mine: pd.DataFrame, other: str) -> list[Answers]:
    """The card's answers and another policy's to the same problems, for each setting that both were run in."""
    theirs, alike = mine[mine["policy"] == other], [*swept(mine), "n_hops", "hop", "seed", "n"]
    found = []
    for card in mine[mine["policy"] == CARD].to_dict("records"):
        same = theirs[(theirs[alike] == pd.Series(card)[alike]).all(axis=1)]
        if same["budget_bits"].notna().any():  # fp16 has neither a budget nor a way of resealing
            same = same[with_budget(same, card["budget_bits"]) & (same["reseal"] == card["reseal"])]
        if len(same):
            budget = bits_text(card["budget_bits"])
            what = f"{hops_text(card['hop'])}, {budget}, {card['reseal']}"
            found.append((what, card["right"], same["right"].iloc[-1]))
    return found


def _significant(found: Sequence[Answers]) -> list[int]:
    """How many more answers the card has right, for each comparison significant by McNemar after Holm."""
    p = holm([mcnemar(card, other)[2] for _, card, other in found])
    return [
        sum(card) - sum(other) for p, (_, card, other) in zip(p, found, strict=True) if p < ALPHA
    ]


def difference(one: Sequence[bool], other: Sequence[bool]) -> tuple[float, float, float]:
    """Points of accuracy that `one` has more than `other`, with Agresti and Min's 95 % interval (2005) for pairs.

    Half a problem is added to each cell, so that no difference at all among n still has a width.
    """
    only_one, only_other, _ = mcnemar(one, other)
    n = len(one) + 2
    centre = (only_one - only_other) / n
    spread = math.sqrt((only_one + only_other + 1) - n * centre**2) / n
    reach = NormalDist().inv_cdf(0.975) * spread
    exact = 100 * (only_one - only_other) / len(one)
    return exact, 100 * (centre - reach), 100 * (centre + reach)


def _span(found: Sequence[Answers]) -> str:
    return f"the same {len(found[0][1])} problems, in {len(found)} settings"


TABLES = {"handoff_accuracy": table, "handoff_pairs": pairs}
FIGURES = {"handoff_hops": figure}
CLAIMS = claims
