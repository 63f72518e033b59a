"""QKVShare's tables on quality: accuracy by hop, paired tests, and the ablation of the controller.

Each takes the tidy rows and returns a table, or None where nothing of it was measured.
"""

from collections.abc import Callable
from itertools import combinations

import pandas as pd
from analysis.handoff_reduce import (
    RELAY,
    SETTING,
    bits_text,
    relays,
    run_text,
    value,
    verdicts,
    with_budget,
)
from analysis.handoff_timing import handoff_stages, handoff_ttft
from analysis.reduce import Value, describe

from analysis import published
from analysis.render import Column, Row, Table, fixed, keys
from polykv.evaluation.statistics import mcnemar

DEPTH = {"working": "kl_depth_working", "passing": "kl_depth_passing"}


def handoff_accuracy(rows: pd.DataFrame) -> Table | None:
    """Accuracy after a relay, published and measured, with KL to the fp16 relay and the bits stored."""
    metrics = ("accuracy", "relay_kl", "relay_same_top1", "mean_bits", "file_bits", *DEPTH.values())
    found = relays(rows, *metrics)
    found = found[found["experiment"] != "controller_ablation"]
    if found.empty:
        return None
    lines = []
    for said in published.load("qkvshare"):
        if said.metric != "gsm8k_accuracy":
            continue
        policy, bits = said.controller
        mine = found[(found["document"] == "gsm8k") & (found["policy"] == policy)]
        same = [published.same_model(said.model, name) for name in mine["model"]]
        mine = mine[pd.Series(same, mine.index, bool)]
        mine = mine[(mine["n_hops"] == int(said.at)) & with_budget(mine, bits)]
        if len(mine):
            mine = mine[mine["reseal"] == mine["reseal"].iloc[0]]
        line = {"section": f"published on {said.model}", "problems": "gsm8k", "policy": policy}
        line |= {"hops": int(said.at), "budget": bits_text(bits), "published": said.value}
        line |= {"reseal": mine["reseal"].iloc[0] if len(mine) else "not stated"}
        lines.append(line | _relay(mine, published.NOT_HERE + f"{said.model} on gsm8k"))
    for key, mine in found.groupby([*SETTING, *RELAY], dropna=False, sort=False):
        named = dict(zip([*SETTING, *RELAY], key, strict=True))
        line = {"section": f"measured on {run_text(named)}", "problems": named["document"]}
        line |= {"policy": named["policy"], "hops": int(named["n_hops"]), "reseal": named["reseal"]}
        line["budget"] = bits_text(named["budget_bits"])
        line["published"] = Value(None, note="not published for this model and problems")
        lines.append(line | _relay(mine, "no such row in these results"))
    columns = [
        *keys("problems", "hops", "policy", "budget", "reseal"),
        Column("published", "published %", fixed(2)),
        Column("strict", "strict % [95 %]", fixed(1), interval=True),
        Column("flexible", "flexible % [95 %]", fixed(1), interval=True),
        Column("kl", "KL to fp16 [95 %]", fixed(5), interval=True),
        Column("working", "depth, working [95 %]", fixed(5, "+"), interval=True),
        Column("passing", "depth, passing [95 %]", fixed(5, "+"), interval=True),
        Column("same_top1", "same top-1", fixed(4)),
        Column("bits", "bits stored", fixed(3)),
        Column("file_bits", "bits of the file", fixed(3)),
    ]
    caption = (
        "Answers after a relay: accuracy with Wilson interval (strict: the number after ####; flexible: "
        "the last number), KL divergence to the fp16 relay on the last agent's answer, teacher-forced, "
        "what depth costs (that KL less the one when only the last of the handoffs takes place; working: "
        "the agents between wrote their turns on caches that were handed to them; passing: they only "
        "passed the card on), "
        "and the mean stored bits per value of the last card: of its tensors with scales, maps and token ids, "
        "and of its file with the header of fixed size. The paper's hops are taken as handoffs. A budget is "
        f"nominal, as its Q4 and Q8 are: payload bits, without metadata. {describe(found)}"
    )
    return Table("handoff_accuracy", caption, columns, lines)


def handoff_pairs(rows: pd.DataFrame) -> Table | None:
    """McNemar's exact test for every pair of policies at equal budget, hops and resealing."""
    found = verdicts(rows)
    if found.empty:
        return None
    same = [*SETTING, "document", "n_hops", "budget_bits", "reseal", "how", "seed", "n"]
    lines = []
    for key, group in found.groupby(same, dropna=False, sort=False):
        named = dict(zip(same, key, strict=True))
        for a, b in combinations(group.to_dict("records"), 2):
            only_a, only_b, p = mcnemar(a["verdicts"], b["verdicts"])
            line = {"section": f"{run_text(named)}, {named['document']}", "one": a["policy"]}
            line |= {"other": b["policy"], "hops": int(named["n_hops"]), "how": named["how"]}
            line |= {"budget": bits_text(named["budget_bits"]), "reseal": named["reseal"]}
            line |= {"n": len(a["verdicts"]), "only_one": only_a, "only_other": only_b}
            lines.append(line | {"p": Value(p)})
    columns = [
        *keys("hops", "budget", "reseal", "how", "one", "other"),
        Column("n", "problems"),
        Column("only_one", "right by one only"),
        Column("only_other", "right by other only"),
        Column("p", "p, exact", fixed(4)),
    ]
    caption = (
        "Policies in pairs: McNemar's exact test on the same problems, every pair at equal nominal bits, hops and "
        f"resealing; not corrected for the number of pairs ({len(lines)}). {describe(found)}"
    )
    return Table("handoff_pairs", caption, columns, lines)


def controller_ablation(rows: pd.DataFrame) -> Table | None:
    """Which signals beat uniform and random bits, and which do not."""
    found = relays(rows[rows["experiment"] == "controller_ablation"], "relay_kl",
                   "kl_minus_uniform", "kl_minus_random")  # fmt: skip
    if found.empty:
        return None
    lines = []
    for key, mine in found.groupby([*SETTING, *RELAY], dropna=False, sort=False):
        named = dict(zip([*SETTING, *RELAY], key, strict=True))
        line = {"section": f"{run_text(named)}, {named['document']}", "signals": named["policy"]}
        line |= {"hops": int(named["n_hops"]), "budget": bits_text(named["budget_bits"])}
        line |= {"reseal": named["reseal"], "kl": value(mine[mine["metric"] == "relay_kl"])}
        for name in ("uniform", "random"):
            apart = value(mine[mine["metric"] == f"kl_minus_{name}"])
            line |= {f"minus_{name}": apart, f"verdict_{name}": _verdict(apart)}
        lines.append(line)
    columns = [
        *keys("budget", "reseal", "hops", "signals"),
        Column("kl", "KL to fp16", fixed(5)),
        Column("minus_uniform", "minus uniform [95 %]", fixed(5, "+"), interval=True),
        Column("verdict_uniform", "against uniform"),
        Column("minus_random", "minus random [95 %]", fixed(5, "+"), interval=True),
        Column("verdict_random", "against random"),
    ]
    caption = (
        "The controller's signals at equal nominal bits: KL divergence to the fp16 relay on the last "
        "agent's answer, and its paired difference to uniform and to random bits on the same problems. "
        "`better` or `worse`: the 95 % interval of the difference leaves out 0, each line by itself (with so many "
        "lines a few do by chance). alpha weighs importance "
        f"against demand, as `alpha (importance) + (1 - alpha) (demand)`. {describe(found)}"
    )
    return Table("controller_ablation", caption, columns, lines)


def _relay(mine: pd.DataFrame, why: str) -> Row:
    def of(metric: str, how: str | None = None) -> Value:
        left = mine[mine["metric"] == metric]
        return value(left if how is None else left[left["how"] == how], why)

    return {
        "strict": of("accuracy", "strict"),
        "flexible": of("accuracy", "flexible"),
        "kl": of("relay_kl"),
        **{name: of(metric) for name, metric in DEPTH.items()},
        "same_top1": of("relay_same_top1"),
        "bits": of("mean_bits"),
        "file_bits": of("file_bits"),
    }


def _verdict(apart: Value) -> str | Value:
    if apart.low is None or apart.high is None:
        return Value(None, note="no interval was given")
    return "better" if apart.high < 0 else "worse" if apart.low > 0 else "no difference"


HANDOFF_TABLES: dict[str, Callable[[pd.DataFrame], Table | None]] = {
    table.__name__: table
    for table in (
        handoff_accuracy,
        handoff_pairs,
        handoff_ttft,
        handoff_stages,
        controller_ablation,
    )
}
