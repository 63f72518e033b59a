"""Sentences on the answers of relays, against tests recomputed from the counts."""

import numpy as np
import pytest
from analysis_rows import cell, write
from scipy import stats

from analysis import catalog
from analysis.load import load

N, N_KL = 150, 16


def relays(policy, budget, first, last, kl=()):
    """A cell in which these problems are right before and after the handoff."""
    one = cell("handoff_accuracy", policy, document="gsm8k", policy=policy, budget_bits=budget)
    for hop, right in enumerate((first, last)):
        where = {"n_hops": 1, "hop": hop, "reseal": "append"}
        for sample in range(N):
            value = float(sample in right)
            for how in ("strict", "flexible"):
                told = where | {"extraction": how, "sample": sample}
                one[3].add("answer_right", value, "rate", **told)
        for sample, value in enumerate(kl if hop else ()):
            one[3].add("kl", value, "nats", sample=sample, **where)
    return one


@pytest.fixture
def said(tmp_path):
    first, rng = range(33), np.random.default_rng(0)
    low, high = rng.uniform(1e-3, 2e-3, (2, N_KL))
    cells = [
        relays("fp16", None, first, range(34)),
        relays("uniform", 4.0, first, range(1, 35), low),
        relays("qkvshare", 4.0, first, range(29, 35), low + high),
        relays("other_card", None, first, range(1)),
    ]
    (lines,) = [
        lines
        for heading, lines in catalog.findings(load(write(tmp_path, cells)).rows).items()
        if heading.startswith("Answers after handoffs")
    ]
    return lines, high


def test_every_question_has_a_sentence_for_each_pair(said):
    lines, _ = said
    asked = [line.split("?")[0] for line in lines]
    assert len(set(asked)) == 4 and len(lines) == 2 + 3 + 1 + 1


def test_verdicts_are_those_of_mcnemars_test_after_holm(said):
    lines, _ = said
    # (right by one only, by the other only) of each sentence, counted from the ranges above.
    apart = [(1, 1), (1, 29), (1, 0), (2, 1), (2, 29), (0, 28), (0, 33)]
    p = [stats.binomtest(a, a + b).pvalue for a, b in apart]
    order, corrected, worst = np.argsort(p), np.empty(len(p)), 0.0
    for rank, at in enumerate(order):
        worst = max(worst, min(1.0, p[at] * (len(p) - rank)))
        corrected[at] = worst
    for line, (a, b), q in zip(lines, apart, corrected, strict=True):
        outcome = "no difference shown" if q >= 0.05 else "better" if a > b else "worse"
        assert f"**{outcome}**" in line, line
        assert f"{100 * (a - b) / N:+.1f} [" in line
        assert ("would have shown" in line) == (q >= 0.05)


def test_the_divergence_is_paired_by_problem(said):
    lines, high = said
    (line,) = [line for line in lines if "KL" in line]
    assert f"{high.mean():+.2g} [" in line and f"over {N_KL} problems" in line


def test_one_policy_alone_has_only_its_handoffs(tmp_path):
    cells = [relays("uniform", 4.0, range(33), range(34))]
    found = catalog.findings(load(write(tmp_path, cells)).rows)
    (lines,) = [lines for heading, lines in found.items() if heading.startswith("Answers")]
    assert len(lines) == 1
