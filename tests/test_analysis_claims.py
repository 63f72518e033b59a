"""Verdicts on claims about answers over handoffs, on synthetic rows."""

import pytest
from analysis.claims import NO, OPEN, YES, claims
from analysis.relay_claims import difference
from analysis_rows import handoff_rows, write

from analysis.load import load


def judged(tmp_path, rows, about):
    """The claims that say `about`, from these rows."""
    found = claims(load(write(tmp_path, rows)).rows)
    return [claim for claim in found if about in claim.claim]


def test_a_verdict_names_the_weights_and_device_it_holds_for(tmp_path):
    for claim in claims(load(write(tmp_path, handoff_rows())).rows):
        if claim.paper == "qkvshare" and claim.verdict != OPEN:
            assert (
                "(on reference weights of reference, " in claim.claim and ", cpu, " in claim.claim
            )


@pytest.mark.parametrize(("loss", "verdict"), [(0, YES), (3, OPEN), (20, NO)])
def test_accuracy_holds_where_a_loss_is_ruled_out_and_not_where_it_is_significant(
    tmp_path, loss, verdict
):
    (claim,) = judged(tmp_path, handoff_rows(loss=loss), "accuracy holds over 2 to 5 hops")
    assert claim.verdict == verdict and claim.measured
    assert f"{-100 * loss / 80:+.1f} points" in claim.said


def test_hops_outside_the_published_ones_do_not_decide(tmp_path):
    (claim,) = judged(tmp_path, handoff_rows(hops=(1, 7), loss=20), "accuracy holds")
    assert claim.verdict == OPEN and "Not measured" in claim.said


@pytest.mark.parametrize(("loss", "verdict"), [(-8, YES), (0, OPEN), (20, NO)])
def test_topology_beats_uniform_by_the_paired_test(tmp_path, loss, verdict):
    (claim,) = judged(tmp_path, handoff_rows(loss=loss), "topology-aware cards answer better")
    assert claim.verdict == verdict


def test_paired_interval_of_accuracy_has_a_width_even_without_differences():
    exact, low, high = difference([True] * 80, [True] * 80)
    assert exact == 0 and low == -high and 2 < high < 3
    exact, low, high = difference([True] * 10 + [False] * 90, [False] * 10 + [True] * 90)
    assert exact == -80 and low < exact < high


