"""PolyKV's claims on quality: is the perplexity delta, or BERTScore, the same as published within a margin?"""

from collections.abc import Sequence
from functools import partial

from analysis.published import Figure
from analysis.reduce import Point, having
from analysis.verdict import OPEN, Claim, equivalent, sentence, with_interval

from analysis import published
from polykv.evaluation.statistics import MIN_DOCUMENTS, interval_over

# What counts as the same: no margin is published, both are our choice. The authors' own two runs of one setting differ
# by 0.32 points (+1.27 and +1.59 %, their experiment log); answers to other questions score near 0.89 by
# roberta-large, so 0.01 is a tenth of what is left to 1.
MARGIN = {"perplexity_delta": 0.5, "bertscore_f1": 0.01}
UNIT = {"perplexity_delta": " points", "bertscore_f1": ""}
NAME = {"perplexity_delta": "perplexity", "bertscore_f1": "BERTScore F1"}
# The protocol of polykv.evaluation.continuation.
OVER_DOCUMENTS = f"paper; {interval_over('documents')}"
of_paper = partial(Claim, "polykv")


def claims(found: Sequence[Point], figures: Sequence[Figure]) -> list[Claim]:
    """Of the abstract's settings: the longest context of each model, delta and BERTScore."""
    lines = []
    for metric in MARGIN:
        said = [f for f in figures if f.metric == metric and f.policy == "polykv"]
        for model in dict.fromkeys(f.model for f in said):
            mine = [f for f in said if f.model == model]
            lines.append(_level(max(mine, key=lambda f: (f.document_tokens, f.n_agents)), found))
    return lines


def _level(f: Figure, found: Sequence[Point]) -> Claim:
    value = f"{f.value.value:+g} %" if f.metric == "perplexity_delta" else f"{f.value.value:g}"
    claim = f"{NAME[f.metric]} {value} on {f.model}, {f.document}, {f.document_tokens:,} tokens"
    answer = published.quality_answer(f, found)
    if isinstance(answer, str) or answer[f.metric].value is None:
        why = answer if isinstance(answer, str) else answer[f.metric].note
        said = sentence(f"{why}; {_command(f)}") + _beside(found, f.metric)
        return of_paper(OPEN, claim, said, measured=False)
    got, margin = answer[f.metric], MARGIN[f.metric]
    n = f", n = {got.n:,}" if got.n else ""
    said = f"Measured on {_where(answer)}{n}: {with_interval(got)}"
    if unlike := _unlike(f, answer):
        return of_paper(OPEN, claim, f"{said}. It decides nothing: {unlike}; {_command(f)}.")
    verdict = equivalent(got, f.value.value - margin, f.value.value + margin)
    more = "; more documents (n_documents=) would tell" if verdict == OPEN else ""
    same = f"within {margin:g}{UNIT[f.metric]} of the published (our margin)"
    return of_paper(
        verdict, claim, f"{said}; it is the same where the whole interval lies {same}{more}."
    )


def _unlike(f: Figure, p: Point) -> str:
    """Why the point cannot be held against the figure, or nothing."""
    got, reasons = p[f.metric], [published.other_weights(f, p)]
    if got.low is None or got.high is None:
        reasons.append("it has no interval")
    elif not _over_documents(f, p):
        reasons.append(f"its interval is not over {MIN_DOCUMENTS} documents or more")
    return ", ".join(filter(None, reasons))


def _over_documents(f: Figure, p: Point) -> bool:
    """A BERTScore counts answers, as many a document as there are agents."""
    got = p[f.metric]
    if f.metric == "perplexity_delta":
        return got.protocol == OVER_DOCUMENTS
    return bool(got.n and p.n_agents) and got.n >= MIN_DOCUMENTS * p.n_agents


def _where(p: Point) -> str:
    length = f"{p.context_tokens:,} tokens" if p.context_tokens else "whole texts"
    return f"{p.weights} weights of {p.model}, {p.document}, {length}, {p.device}, {p.dtype}"


def _command(f: Figure) -> str:
    """What would tell: the paper's setting, over documents enough for an interval."""
    parts = [f"model={f.model.removesuffix('-instruct')}"]
    parts += ["model.quantization=bnb_4bit"] * (published.WEIGHTS_OF.get(f.model) == "nf4")
    parts += [f"document={published.FAMILY[f.document][0]}", f"context={f.document_tokens}"]
    parts += [f"n_documents={MIN_DOCUMENTS}", f"n_agents={f.n_agents}"]
    parts += [f"scorer={published.SCORER}"] * f.metric.startswith("bertscore")
    return f"run experiment=polykv_quality {' '.join(parts)}"


def _beside(found: Sequence[Point], metric: str) -> str:
    """What other weights gave, for orientation."""
    mine = [p for p in having(found, metric) if p.recipe == "polykv" and p.context_tokens]
    if not mine:
        return ""
    p = max(mine, key=lambda p: p.context_tokens)
    scored = f", scored by {p.scorer}" if metric.startswith("bertscore") else ""
    return f" On {_where(p)}{scored}, it is {with_interval(p[metric])}."
