"""PolyKV's claims, each with a verdict from the rows and the sentence that says why.

A verdict holds for the weights that it names and for no others.
"""

from collections.abc import Sequence

import pandas as pd

from analysis import published
from analysis.frontier import ALPHA, by_document, of_experiment, settings, trend, values
from analysis.published import Figure
from analysis.reduce import Point, Value, having, points
from polykv.evaluation.statistics import MIN_DOCUMENTS, paired_p

YES, NO, OPEN = "reproduced", "not reproduced", "cannot be told here"
ROUNDING = 0.0005  # of the published GB


def claims(rows: pd.DataFrame, figures: Sequence[Figure]) -> list[str]:
    """One line of Markdown for each claim and each weights that can tell."""
    found = points(rows)
    return [
        _ratio(rows, figures),
        *_memory(found, figures),
        *_quality(found, figures),
        *_context(rows),
        *_agents(rows),
        *_asymmetry(rows),
    ]


def _verdict(verdict: str, claim: str, said: str) -> str:
    return f"**{verdict}**: {claim}. {said}"


def _ratio(rows: pd.DataFrame, figures: Sequence[Figure]) -> str:
    said = next(f.value.value for f in figures if f.metric == "compression_ratio")
    claim = f"the cache becomes {said:g} times smaller"
    mine = rows[rows["recipe"] == "polykv"]
    ratios = mine[mine["metric"] == "compression_ratio"][["protocol", "value"]]
    bits = mine[mine["metric"] == "bits"][["protocol", "value"]]
    found = pd.concat([ratios, bits.assign(value=16 / bits["value"])])
    if found.empty:
        return _verdict(OPEN, claim, "No ratio was measured; run experiment=polykv_ratio.")
    nominal = found.loc[found["protocol"] == "nominal", "value"].iloc[0]
    stored = found.loc[found["protocol"] == "stored", "value"]
    ends = dict.fromkeys(f"{number:.3f}" for number in (stored.min(), stored.max()))
    return _verdict(
        YES if abs(nominal - said) < 0.005 else NO,
        claim,
        f"Counting payload bits it is {nominal:.3f}, whatever the weights; counting every byte kept, "
        f"{' to '.join(ends)}.",
    )


def _memory(found: Sequence[Point], figures: Sequence[Figure]) -> list[str]:
    lines = []
    for f in figures:
        if f.metric != "kv_memory" or f.n_agents != 15:
            continue
        claim = f"{f.value.value:g} GB for {f.n_agents} agents at {f.document_tokens:,} tokens ({f.policy})"
        answer = published.memory_answer(f, found)
        if isinstance(answer, str):
            lines.append(
                _verdict(OPEN, claim, _sentence(f"{answer}; run experiment=polykv_memory"))
            )
            continue
        same = abs(answer["paper"].value - f.value.value) < ROUNDING
        lines.append(
            _verdict(
                YES if same else NO,
                claim,
                f"In the paper's accounting (fp32, computed) it is {answer['paper'].value:.3f} GB; every byte "
                f"kept is {answer['stored'].value:.3f} GB ({answer.model}; bytes do not depend on weights).",
            )
        )
    return lines


def _quality(found: Sequence[Point], figures: Sequence[Figure]) -> list[str]:
    """Of the abstract's settings: the longest context of each model, delta and BERTScore."""
    lines = []
    for metric, name in (("perplexity_delta", "perplexity"), ("bertscore_f1", "BERTScore F1")):
        said = [f for f in figures if f.metric == metric and f.policy == "polykv"]
        for model in dict.fromkeys(f.model for f in said):
            mine = [f for f in said if f.model == model]
            f = max(mine, key=lambda f: (f.document_tokens, f.n_agents))
            value = (
                f"{f.value.value:+g} %" if metric == "perplexity_delta" else f"{f.value.value:g}"
            )
            claim = f"{name} {value} on {model}, {f.document}, {f.document_tokens:,} tokens"
            answer = published.quality_answer(f, found)
            if isinstance(answer, str) or answer[metric].value is None:
                why = answer if isinstance(answer, str) else answer[metric].note
                lines.append(_verdict(OPEN, claim, _sentence(why) + _beside(found, metric)))
                continue
            got = answer[metric]
            inside = got.low is not None and got.low <= f.value.value <= got.high
            where = f"on {answer.weights} weights of {answer.model}, {answer.document}"
            lines.append(
                _verdict(YES if inside else NO, claim, f"Measured {where}: {with_interval(got)}.")
            )
    return lines


def _beside(found: Sequence[Point], metric: str) -> str:
    """What other weights gave, for orientation."""
    mine = [p for p in having(found, metric) if p.recipe == "polykv" and p.context_tokens]
    if not mine:
        return ""
    p = max(mine, key=lambda p: p.context_tokens)
    place = f"{p.model} ({p.weights} weights, {p.context_tokens:,} tokens)"
    return f" On {place} it is {with_interval(p[metric])}."


def _context(rows: pd.DataFrame) -> list[str]:
    claim = "the perplexity delta shrinks as the context grows"
    rows = of_experiment(rows, "context_scaling")
    rows = rows[rows["recipe"] == "polykv"]
    lines = []
    for (model, weights), mine in rows.groupby(["model", "weights"]):
        documents = by_document(mine, "polykv")
        slope = trend(list(documents["context_tokens"]), list(documents["value"]))
        if slope.value is None:
            lines.append(_verdict(OPEN, claim, _sentence(slope.note)))
            continue
        mean = float(documents["value"].mean())
        towards = Value(slope.value, slope.low, slope.high)
        if mean < 0:  # a negative delta shrinks upwards
            towards = Value(-slope.value, -slope.high, -slope.low)
        contexts = sorted({int(context) for context in documents["context_tokens"]})
        lines.append(
            _verdict(
                YES if towards.high < 0 else NO if towards.low > 0 else OPEN,
                f"{claim} (on {weights} weights of {model})",
                f"Over {contexts[0]:,} to {contexts[-1]:,} tokens, {len(documents)} documents, its mean is "
                f"{mean:+.3f} % and it changes by {with_interval(slope, '+.3f')} points with each doubling.",
            )
        )
    return lines or [_verdict(OPEN, claim, "Not measured; run experiment=context_scaling.")]


def _agents(rows: pd.DataFrame) -> list[str]:
    claim = "quality does not depend on how many agents read the pool"
    rows = of_experiment(rows, "agent_scaling")
    lines = []
    for setting, mine in settings(rows[rows["recipe"] == "polykv"]):
        spread = float(mine.loc[mine["metric"] == "agent_spread", "value"].max())
        numbers = sorted({int(n) for n in mine["n_agents"]})
        lines.append(
            _verdict(
                YES if spread == 0 else NO,
                f"{claim} (on {setting.weights} weights of {setting.model})",
                f"With {numbers[0]} to {numbers[-1]} agents no log-probability of any two differs by more "
                f"than {spread:.2g} nats: the pool is never written after it is made.",
            )
        )
    return lines or [_verdict(OPEN, claim, "Not measured; run experiment=agent_scaling.")]


def _asymmetry(rows: pd.DataFrame) -> list[str]:
    claim = "keys deserve more bits than values (8 and 3)"
    rows = of_experiment(rows, "kv_asymmetry")
    lines = []
    for setting, mine in settings(rows):
        two = [mine[mine["recipe"] == recipe] for recipe in ("k8v3", "k3v8")]
        if any(part.empty for part in two):
            continue
        means = [values(part)["kl_mean"] for part in two]
        p = _paired(mine, "k8v3", "k3v8")
        verdict = (
            OPEN if p is None or p >= ALPHA else YES if means[0].value < means[1].value else NO
        )
        lines.append(
            _verdict(
                verdict,
                f"{claim} (on {setting.weights} weights of {setting.model})",
                f"At equal bits, rotated absmax: mean KL {with_interval(means[0], '.3g')} with keys at 8 and "
                f"values at 3, {with_interval(means[1], '.3g')} the other way round{p_said(p)}.",
            )
        )
    return lines or [_verdict(OPEN, claim, "Not measured; run experiment=kv_asymmetry.")]


def _paired(rows: pd.DataFrame, first: str, second: str) -> float | None:
    wide = rows[rows["metric"] == "document_kl_mean"].pivot_table(
        index=["seed", "protocol"], columns="recipe", values="value"
    )[[first, second]]
    wide = wide.dropna()
    return paired_p(wide[first], wide[second]) if len(wide) >= MIN_DOCUMENTS else None


def _sentence(said: str) -> str:
    return f"{said[0].upper()}{said[1:]}."


def with_interval(value: Value, form: str = ".4g") -> str:
    said = f"{value.value:{form}}"
    if value.low is None or value.high is None:
        return f"{said} (no interval)"
    return f"{said} [{value.low:{form}}, {value.high:{form}}]"


def p_said(p: float | None, how: str = "") -> str:
    return "" if p is None else f", p = {p:.2g}{how}"
