"""PolyKV's claims: ratio, memory, perplexity, BERTScore, and what context, agents and asymmetry do to them."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import isfinite

import pandas as pd
from analysis.apart import without_settings
from analysis.frontier import ALPHA, by_document, of_experiment, settings, trend, values
from analysis.published import Figure
from analysis.reduce import BASELINE, Point, Value, having, points
from analysis.verdict import AGREES, NO, OPEN, YES, Claim, p_said, sentence, with_interval

from analysis import published, quality_claims
from polykv.evaluation.statistics import MIN_DOCUMENTS, paired_p

ROUNDING = 0.0005  # of the published GB
TREND = "run experiment=context_scaling with three contexts (context=) of n_documents=8"
PRINTED = 0.01  # a perplexity delta's last printed digit, in percent
SAME_NATS = 0.01  # of one token's log-probability; rounding is a hundred times less
NOTICEABLE = 0.95  # of the memory: a repeat differs by a percent or two
of_paper = partial(Claim, "polykv")


def claims(rows: pd.DataFrame) -> list[Claim]:
    """One for each claim and each weights that can tell, else one that says what would tell."""
    figures, found = published.load("polykv"), points(rows)
    return [
        _ratio(rows, figures),
        *_memory(found, figures),
        *_resident(having(found, "resident")),
        *quality_claims.claims(found, figures),
        *_context(rows),
        *_agents(rows),
        *_asymmetry(rows),
    ]


def _ratio(rows: pd.DataFrame, figures: Sequence[Figure]) -> Claim:
    said = next(f.value.value for f in figures if f.metric == "compression_ratio")
    claim = f"the cache becomes {said:g} times smaller"
    mine = rows[rows["recipe"] == "polykv"]
    ratios = mine[mine["metric"] == "compression_ratio"][["protocol", "value"]]
    bits = mine[mine["metric"] == "bits"][["protocol", "value"]]
    found = pd.concat([ratios, bits.assign(value=16 / bits["value"])])
    nominal, stored = (
        found.loc[found["protocol"] == kind, "value"] for kind in ("nominal", "stored")
    )
    if nominal.empty or stored.empty:
        why = "No ratio was measured; run experiment=polykv_ratio."
        return of_paper(OPEN, claim, why, measured=False)
    ends = dict.fromkeys(f"{number:.3f}" for number in (stored.min(), stored.max()))
    return of_paper(
        AGREES if abs(nominal.iloc[0] - said) < 0.005 else NO,
        claim,
        f"16 bits over the mean payload bits of the recipe are {nominal.iloc[0]:.3f}, computed, whatever the "
        f"weights; measured, over every byte kept, it is {' to '.join(ends)}.",
    )


def _memory(found: Sequence[Point], figures: Sequence[Figure]) -> list[Claim]:
    mine = [f for f in figures if f.metric == "kv_memory" and f.n_agents == 15]
    return [_gigabytes(f, having(found, "paper")) for f in mine]


def _gigabytes(f: Figure, found: Sequence[Point]) -> Claim:
    where = f"{f.n_agents} agents at {f.document_tokens:,} tokens ({f.policy})"
    claim = f"{f.value.value:g} GB for {where}"
    answer = published.memory_answer(f, found)
    if isinstance(answer, str):
        why = sentence(f"{answer}; run experiment=polykv_memory")
        return of_paper(OPEN, claim, why, measured=False)
    same = abs(answer["paper"].value - f.value.value) < ROUNDING
    kept = answer["stored"].value
    every_byte = "" if kept is None else f"; measured, every byte kept, it is {kept:.3f} GB"
    return of_paper(
        AGREES if same else NO,
        claim,
        f"The paper's accounting, worked back from its table (fp32, the prefilled part), gives "
        f"{answer['paper'].value:.3f} GB, computed from the geometry of {answer.model}{every_byte}.",
    )


def _resident(found: Sequence[Point]) -> list[Claim]:
    """At the most agents of each weights: what they take while all decode, by reader."""
    claim = "agents that read one pool take less memory than agents with a cache each"
    most: dict[tuple[str, str], Point] = {}
    for p in found:
        key = (p.model, p.weights)
        if p.recipe == BASELINE and p.n_agents and _crowd(p) >= _crowd(most.get(key, p)):
            most[key] = p
    lines = []
    for key, private in most.items():
        readers: dict[str, float] = {}  # of several backends the best
        for p in (p for p in found if _same_crowd(p, private)):
            reader, taken = without_settings(p.reader), p["resident"].value
            readers[reader] = min(taken, readers.get(reader, taken))
        if "inject" in readers:
            lines.append(_reader_by_reader(_on(claim, *key), private, readers))
    return lines or [_not_run(claim, "polykv_memory")]


def _reader_by_reader(claim: str, private: Point, readers: Mapping[str, float]) -> Claim:
    theirs = private["resident"].value
    said = (
        f"a private cache each {1e3 * theirs:.3g} MB; one pool, which each rebuilds as published "
    )
    said += f"(inject), {1e3 * readers['inject']:.3g} MB"
    if "cascade" in readers:
        said += (
            f"; one pool that all attend to in place (cascade) {1e3 * readers['cascade']:.3g} MB"
        )
    where = f"{private.n_agents} agents decode after {private.context_tokens:,} tokens on {private.device}, "
    where += private.dtype
    saved = readers["inject"] < NOTICEABLE * theirs
    return of_paper(YES if saved else NO, claim, f"Measured while {where}: {said}.")


def _crowd(p: Point) -> tuple[int, int]:
    return p.n_agents, p.context_tokens


def _same_crowd(p: Point, other: Point) -> bool:
    return p.recipe == "polykv" and all(
        getattr(p, name) == getattr(other, name)
        for name in (
            "model",
            "weights",
            "dtype",
            "device",
            "document",
            "context_tokens",
            "n_agents",
        )
    )


def _context(rows: pd.DataFrame) -> list[Claim]:
    claim = "the perplexity delta shrinks as the context grows"
    rows = of_experiment(rows, "context_scaling")
    groups = rows[rows["recipe"] == "polykv"].groupby(["model", "weights"])
    found = [_shrinks(_on(claim, *names), mine) for names, mine in groups]
    return found or [_not_run(claim, "context_scaling")]


def _shrinks(claim: str, mine: pd.DataFrame) -> Claim:
    documents = by_document(mine, "polykv")
    slope = trend(list(documents["context_tokens"]), list(documents["value"]))
    if slope.low is None:
        return of_paper(OPEN, claim, sentence(f"{slope.note}; {TREND}"))
    mean = float(documents["value"].mean())
    towards = Value(slope.value, slope.low, slope.high)
    if mean < 0:  # a negative delta shrinks upwards
        towards = Value(-slope.value, -slope.high, -slope.low)
    contexts = sorted({int(context) for context in documents["context_tokens"]})
    return of_paper(
        YES if towards.high < 0 else NO if towards.low > 0 else OPEN,
        claim,
        f"Over {contexts[0]:,} to {contexts[-1]:,} tokens, {len(documents)} documents, its mean is "
        f"{mean:+.3f} % and it changes by {with_interval(slope, '+.3f')} points with each doubling"
        + (
            "."
            if towards.high < 0 or towards.low > 0
            else "; more documents (n_documents=) would tell."
        ),
    )


def _agents(rows: pd.DataFrame) -> list[Claim]:
    claim = "quality does not depend on how many agents read the pool"
    rows = of_experiment(rows, "agent_scaling")
    groups = settings(rows[rows["recipe"] == "polykv"])
    found = [_same_for_all(_on(claim, s.model, s.weights), mine) for s, mine in groups]
    return found or [_not_run(claim, "agent_scaling")]


def _same_for_all(claim: str, mine: pd.DataFrame) -> Claim:
    spread = float(mine.loc[mine["metric"] == "agent_spread", "value"].max())
    numbers = sorted({int(n) for n in mine["n_agents"]})
    deltas = mine[mine["metric"] == "perplexity_delta"].groupby("n_agents")["value"].mean()
    apart = float(deltas.max() - deltas.min())
    if len(deltas) < 2 or not isfinite(apart) or not isfinite(spread):
        return of_paper(OPEN, claim, "One number of agents tells nothing; run n_agents=1,15.")
    return of_paper(
        YES if apart < PRINTED and spread < SAME_NATS else NO,
        claim,
        f"With {numbers[0]} to {numbers[-1]} agents in a batch the perplexity delta changes by {apart:.2g} "
        f"points, and no agent's log-probability differs from a single reader's by more than {spread:.2g} nats.",
    )


def _asymmetry(rows: pd.DataFrame) -> list[Claim]:
    claim = "keys deserve more bits than values (8 and 3)"
    found = []
    for setting, mine in settings(of_experiment(rows, "kv_asymmetry")):
        means = [values(mine[mine["recipe"] == name]).get("kl_mean") for name in ("k8v3", "k3v8")]
        if None not in means:
            p = _paired(mine, "k8v3", "k3v8")
            found.append(_unequal(_on(claim, setting.model, setting.weights), *means, p))
    return found or [_not_run(claim, "kv_asymmetry")]


def _unequal(claim: str, keys: Value, vals: Value, p: float | None) -> Claim:
    tied = p is None or p >= ALPHA
    return of_paper(
        OPEN if tied else YES if keys.value < vals.value else NO,
        claim,
        f"At equal bits, rotated absmax: mean KL {with_interval(keys, '.3g')} with keys at 8 and "
        f"values at 3, {with_interval(vals, '.3g')} the other way round{p_said(p)}"
        + ("; more documents (n_documents=) would tell." if tied else "."),
    )


def _paired(rows: pd.DataFrame, first: str, second: str) -> float | None:
    wide = rows[rows["metric"] == "document_kl_mean"].pivot_table(
        index=["seed", "protocol"], columns="recipe", values="value"
    )[[first, second]]
    wide = wide.dropna()
    return paired_p(wide[first], wide[second]) if len(wide) >= MIN_DOCUMENTS else None


def _on(claim: str, model: str, weights: str) -> str:
    return f"{claim} (on {weights} weights of {model})"


def _not_run(claim: str, experiment: str) -> Claim:
    return of_paper(OPEN, claim, f"Not measured; run experiment={experiment}.", measured=False)
