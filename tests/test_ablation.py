"""The ablation's findings after correction, on made-up differences to uniform bits."""

import pytest
from analysis_rows import handoff_rows, write

from analysis import ablation, findings
from analysis.load import load


def rows(differences, half_width=1e-3):
    """One line for each (signals, budget, reseal): KL less that of uniform bits, nats."""
    found = [row for row in handoff_rows() if row["metric"] == "kl_minus_uniform"][:1]
    for (signals, bits, reseal), apart in differences.items():
        ends = {"ci_low": apart - half_width, "ci_high": apart + half_width}
        place = {"policy": signals, "budget_bits": bits, "protocol": f"teacher-forced; {reseal}"}
        found.append(found[0] | {"value": apart, "cell": f"{signals}{bits}{reseal}"} | ends | place)
    return found[1:]


def said(tmp_path, differences, **more):
    text = findings.text(load(write(tmp_path, rows(differences, **more))).rows)
    assert "## Which signals earn their bits (our question)" in text
    return " ".join(text.split("## Which signals")[1].split())


def settings(signals, *differences):
    """Four settings of one policy."""
    places = [(bits, reseal) for bits in (3.0, 4.0) for reseal in ("append", "requantize")]
    return {(signals, *place): d for place, d in zip(places, differences, strict=True)}


def test_p_is_the_normal_one_that_the_width_implies():
    at_edge = ablation.Comparison("s", "append", "", ablation.Value(-1e-3, -2e-3, 0.0))
    assert at_edge.p == pytest.approx(0.05)
    skewed = ablation.Comparison("s", "append", "", ablation.Value(-1e-3, -2.9e-3, -1e-4))
    assert skewed.better and skewed.p > 0.05  # its near end flatters, its width does not
    assert ablation.Comparison("s", "append", "", ablation.Value(0.0, 0.0, 0.0)).p == 1
    assert ablation.Comparison("s", "append", "", ablation.Value(1.0, 1.0, 1.0)).p == 0


def test_eight_of_a_hundred_that_win_by_their_own_interval_are_no_finding(tmp_path):
    wins = settings("surprisal", -1.2e-3, -1.3e-3, -1.4e-3, -1.5e-3)
    none = {(f"signal{n}", 4.0, "append"): 1e-4 for n in range(96)}
    text = said(tmp_path, wins | none)
    assert "**no signal beats equal bits** after Holm over all 100 comparisons" in text
    assert "4 are better and 0 worse, where chance alone gives about 2.5 of either" in text
    assert "Most often better: surprisal" in text and "2 of 2 under append" in text


def test_a_difference_that_survives_correction_is_said(tmp_path):
    none = {(f"signal{n}", 4.0, "append"): 1e-4 for n in range(96)}
    text = said(tmp_path, settings("surprisal", -5e-3, -1e-4, -1e-4, 5e-3) | none)
    assert "**better in 1** after Holm over all 100 comparisons" in text
    assert "1 are worse after it" in text


@pytest.mark.parametrize(
    ("apart", "outcome"),
    [
        (
            (-1.1e-3, 1e-4, 1e-4, 1e-4),
            "a tie",
        ),  # one interval leaves out 0: not after Holm over four
        ((-1.4e-3, 1e-4, 1e-4, 1e-4), "better"),
        ((1.1e-3, -1e-4, -1e-4, -1e-4), "a tie"),
        ((1.4e-3, -1e-4, -1e-4, -1e-4), "worse"),
        ((1.4e-3, -1.4e-3, 1e-4, 1e-4), "a tie"),
    ],
)
def test_the_published_controller_is_held_to_its_own_settings_after_holm(tmp_path, apart, outcome):
    """p of 1.1 and 1.4 half widths: 0.031 and 0.0061, times four."""
    text = said(tmp_path, settings(ablation.published_signals(), *apart))
    assert f"ones of equal bits: **{outcome}**" in text


def test_the_question_is_ours_and_stands_under_no_papers_claims(tmp_path):
    text = findings.text(load(write(tmp_path, handoff_rows())).rows)
    claims = text.split("## QKVShare's claims")[1].split("\n## ")[0]
    assert "uniform" in claims and "nearer to fp16" not in claims and "KL" not in claims
    assert "## Which signals" not in findings.text(
        load(write(tmp_path / "none", handoff_rows()[:4])).rows
    )
