"""Paired ratios of relays' KL: depth, requantizing and topology-awareness, against tests computed anew."""

import numpy as np
import pytest
from analysis_rows import cell, write
from scipy import stats

from analysis import catalog, handoff_ratios
from analysis.load import load

N = 12
NOISE = np.random.default_rng(5).normal(0, 0.3, (6, N))


def relay(policy, reseal="append", once=None, **kl):
    """A cell of three handoffs with these KL divergences by hop (`h2`) and, at the last, after it alone."""
    one = cell("handoff_accuracy", f"{policy}-{reseal}", policy=policy, budget_bits=4.0)
    where = {"n_hops": 3, "reseal": reseal}
    values = {("kl", int(hop[1:])): of for hop, of in kl.items()}
    values |= {} if once is None else {("kl_once", 3): once}
    for (metric, hop), of in values.items():
        for sample, value in enumerate(of):
            one[3].add(metric, value, "nats", sample=sample, hop=hop, **where)
    return one


def lines(tmp_path, *cells):
    rows = load(write(tmp_path, cells)).rows
    shown = catalog.pieces("TABLES")["handoff_ratios"](rows)
    return {(li["section"].split("?")[0], li["policy"], li["hop"]): li for li in shown.rows}, rows


def kl(number, factor=1.0):
    return 1e-3 * factor * np.exp(NOISE[number])


def test_ratios_and_tests_are_those_of_scipy(tmp_path):
    deep = relay("uniform", h2=kl(0), h3=kl(1, 4), once=kl(2))
    again = relay("uniform", "requantize", h2=kl(3), h3=kl(4, 4))
    found, rows = lines(tmp_path, deep, again)
    expected = {
        ("Do the handoffs before the last one add divergence", 3): (kl(1, 4), kl(2)),
        ("Does requantizing everything at each handoff add divergence, against appending", 2): (
            kl(3),
            kl(0),
        ),
        ("Does requantizing everything at each handoff add divergence, against appending", 3): (
            kl(4, 4),
            kl(1, 4),
        ),
    }
    tests = {
        place: stats.ttest_rel(np.log(own), np.log(other))
        for place, (own, other) in expected.items()
    }
    assert len(found) == len(expected)
    for (question, hop), (own, other) in expected.items():
        line = found[question, "uniform", hop]
        test, ratio = tests[question, hop], line["ratio"]
        assert ratio.value == pytest.approx(np.exp(np.log(own / other).mean()))
        assert (ratio.low, ratio.high) == pytest.approx(tuple(np.exp(test.confidence_interval())))
        assert line["p"].value >= test.pvalue and line["n"] == N
    depth = found["Do the handoffs before the last one add divergence", "uniform", 3]
    assert depth["verdict"] == "worse" and depth["p"].value == pytest.approx(
        3 * min(t.pvalue for t in tests.values())
    )
    assert (
        found[
            "Does requantizing everything at each handoff add divergence, against appending",
            "uniform",
            2,
        ]["verdict"]
        == "no difference shown"
    )
    (said,) = handoff_ratios.findings(rows).values()
    assert len(said) == 3 and sum("would have shown" in sentence for sentence in said) == 2


def test_topology_awareness_is_held_to_the_same_signals_without_it(tmp_path):
    cells = [
        relay("local", h3=kl(0)),
        relay("topology", h3=kl(0)),
        relay("dont_waste_bits", h3=kl(1)),
    ]
    found, _ = lines(tmp_path, *cells, relay("qkvshare", h3=kl(2, 0.3)))
    question = "Does topology-awareness reduce divergence"
    assert found[question, "topology", 3]["verdict"] == "the same cards"
    assert found[question, "topology", 3]["p"].value is None
    assert found[question, "qkvshare", 3]["verdict"] == "better"


def test_what_has_no_counterpart_is_not_shown(tmp_path):
    rows = load(write(tmp_path, [relay("topology", h3=kl(0))])).rows
    assert catalog.pieces("TABLES")["handoff_ratios"](rows) is None
