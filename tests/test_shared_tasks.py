"""experiment=shared_tasks: a cell on the reference model, its controls, and what the analysis makes of answers."""

import numpy as np
import pytest
from conftest import checked_cell

from analysis import shared_tasks as shown
from analysis.load import load
from analysis.retrieval import by_run
from analysis.style import Picture
from experiments.session import Session
from experiments.shared_tasks import STUDY
from polykv.errors import PolyKVError
from polykv.evaluation.statistics import detectable
from polykv.results import Rows, Store
from polykv.tasks.given import NOTHING

REFERENCE = ("experiment=shared_tasks", "document=generated", "context=256", "n_documents=3", "n_agents=5",
             "max_new_tokens=12", "device=cpu", "backend=torch")  # fmt: skip

DAMAGING = ["turboquant_2bit", "recipe.key.bits=1", "recipe.value.bits=1"]
DAMAGED = "turboquant_2bit+key.bits=1+value.bits=1"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows of three cells, written and read again."""
    root, session = tmp_path_factory.mktemp("shared"), Session()
    for number, recipe in enumerate((["full"], ["q8_0"], DAMAGING)):
        study, cfg = checked_cell(*REFERENCE, f"recipe={recipe[0]}", *recipe[1:])
        Store(root).write(study.declaration(), f"cell{number}", {}, study.run(cfg, session))
    return load(root)


def rights(rows, metric="contains", **where):
    for name, value in where.items():
        rows = rows[rows[name] == value]
    return rows.loc[rows["metric"] == metric, "value"]


@pytest.mark.slow
def test_only_the_right_document_answers(measured):
    full = {
        given: rights(measured.rows, recipe="full", given=given)
        for given in ("document", "other", "nothing")
    }
    assert all(len(of) == 15 for of in full.values())
    assert full["document"].mean() > 0.9
    assert full["other"].mean() < 0.2 and full["nothing"].mean() < 0.2
    chosen = rights(measured.rows, "choice_right", recipe="full", given="document")
    assert chosen.mean() > 0.9


@pytest.mark.slow
def test_a_damaged_cache_answers_less(measured):
    exact, near, damaged = (
        rights(measured.rows, "answer_logprob", recipe=recipe, given="document").mean()
        for recipe in ("full", "q8_0", DAMAGED)
    )
    assert abs(near - exact) < 0.1 < exact - damaged


@pytest.mark.slow
def test_a_cell_keeps_what_was_said(measured):
    said = measured.cells["shared_tasks", "cell1"].answers
    assert len(said) == 15 and {"question", "gold", "answer", "given"} <= set(said[0])


@pytest.mark.slow
def test_the_tables_and_figures_are_of_what_was_measured(measured):
    lines = {line["recipe"]: line for line in shown.table(measured.rows).rows}
    assert lines["full"]["counts"] == "yes" and lines["full, no document"]["right"].value < 20
    assert lines["q8_0"]["apart"].value == 0 and lines[DAMAGED]["logprob"].value < -0.1
    assert lines["q8_0"]["bits"].value == pytest.approx(8.5)
    assert all(isinstance(of(measured.rows), Picture) for of in shown.FIGURES.values())


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("n_documents=1", "raise n_documents"),
        ("n_wrong=5", "n_wrong"),
        ("n_wrong=-1", "n_wrong=-1"),
        ("weights=random", "random weights"),
        ("context=null", "context"),
    ],
)
def test_bad_input_is_refused(override, named):
    with pytest.raises(PolyKVError, match=named) as refused:
        checked_cell(*REFERENCE, override)
    assert "\n" not in str(refused.value)


def test_questions_without_known_answers_are_refused(checkpoint):
    local = ("model=local", f"model.path={checkpoint}", "document=file", "context=100")
    with pytest.raises(PolyKVError, match="document=needle"):
        checked_cell(*REFERENCE, *local, f"document.path={checkpoint / 'text.txt'}")


# What the analysis makes of answers that are known

N_DOCUMENTS, N_AGENTS = 8, 15
BITS = {"full": 16.0, "near": 8.0, "worse": 4.0}


def made_up(
    root, full=0.9, nothing=0.0, task="needle", context=512, bad_depth=False, reader="in_place"
):
    """Answers of three recipes: `near` as `full`, and `worse`, which lacks every third answer of it."""
    rng = np.random.default_rng(0)
    places = [(document, agent) for document in range(N_DOCUMENTS) for agent in range(N_AGENTS)]
    exact = rng.random(len(places)) < full
    exact = [
        bool(right) and not (bad_depth and agent < 3)
        for right, (_, agent) in zip(exact, places, strict=True)
    ]
    without = rng.random(len(places)) < nothing
    third = [right and number % 3 > 0 for number, right in enumerate(exact)]
    verdicts = {("full", "document"): exact, ("full", "nothing"): without, ("full", "other"): without,
                ("near", "document"): exact, ("worse", "document"): third}  # fmt: skip
    for recipe, bits in BITS.items():
        rows = Rows(STUDY.columns, model="m", weights="w", document=task, context_tokens=context, n_agents=N_AGENTS,
                    recipe=recipe, reader=reader, dtype="bfloat16", device="cpu", seed=0)  # fmt: skip
        rows.add("compression_ratio", 16 / bits, "x", accounting="stored")
        rows.add("questions_per_minute", 60.0, "1/min")
        for (name, given), right in verdicts.items():
            for (document, agent), verdict in zip(places, right, strict=True):
                if name != recipe:
                    continue
                place = {
                    "sample": document,
                    "text": f"{task}{context}{document}",
                    "agent": agent,
                    "n": 1,
                }
                place |= {"given": given, "depth": agent / N_AGENTS}
                rows.add("contains", float(verdict), "rate", **place)
                lost = 1.0 if (recipe, given) == ("worse", "document") else 0.0
                rows.add("answer_logprob", -1.0 - lost - 0.1 * agent, "nats", **place)
                rows.add("choice_right", float(verdict), "rate", **place)
        Store(root).write(STUDY.declaration(), f"{recipe}-{task}-{context}-{reader}", {}, rows)


def test_a_known_loss_is_found_and_no_loss_is_told_with_what_would_have_shown(tmp_path):
    made_up(tmp_path)
    rows = load(tmp_path).rows
    lines = {line["recipe"]: line for line in shown.recipes(rows).rows}
    assert [*lines] == ["full", "near", "worse"] or [*lines] == ["near", "full", "worse"]
    right = lines["full"]["right"].value
    assert lines["worse"]["apart"].value == pytest.approx(-right / 3, abs=2)
    assert lines["worse"]["apart"].low < -right / 3 < lines["worse"]["apart"].high
    assert lines["worse"]["logprob"].value == pytest.approx(-1) and lines["worse"]["p"].value < 1e-6
    assert lines["near"]["apart"].value == 0 and lines["near"]["p"].value == 1
    assert 0 < lines["near"]["detectable"].value < 15 and lines["near"]["n"] == 120
    # Two recipes are corrected together.
    assert lines["near"]["detectable"].value == pytest.approx(100 * detectable(120, 0, 0.05 / 2))
    ((_, said),) = shown.findings(rows).items()
    (near,) = (line for line in said if line.startswith("near"))
    (worse,) = (line for line in said if line.startswith("worse"))
    assert "no difference shown" in near and "would have shown" in near and "**worse**" in worse


@pytest.mark.parametrize(
    ("answers", "why"),
    [({"full": 0.5}, "less than 60"), ({"nothing": 0.3}, "more than 20"), ({}, "")],
)
def test_a_task_counts_between_ceiling_and_floor(tmp_path, answers, why):
    made_up(tmp_path, **answers)
    ((_, (task,)),) = by_run(load(tmp_path).rows)
    assert (why in task.why_not) if why else task.why_not == ""
    lines = shown.table(load(tmp_path).rows).rows
    assert all(line["counts"] == (task.why_not or "yes") for line in lines)


def test_what_does_not_count_is_in_no_ranking_and_is_said(tmp_path):
    made_up(tmp_path)
    made_up(tmp_path, full=0.5, task="hard")
    rows = load(tmp_path).rows
    table = shown.recipes(rows)
    assert "1 of 2" in table.rows[0]["section"] and table.rows[0]["n"] == 120
    ((_, said),) = shown.findings(rows).items()
    assert "1 of 2" in said[0] and "hard at 512" in said[0]
    made_up(tmp_path / "hard", full=0.5)
    only_hard = load(tmp_path / "hard").rows
    assert shown.recipes(only_hard) is None and isinstance(shown.figure(only_hard), str)


def test_recipes_are_ranked_among_those_that_answered_the_same_questions(tmp_path):
    made_up(tmp_path)
    made_up(tmp_path, full=0.7, task="harder")
    rows = load(tmp_path).rows
    rows = rows[(rows["recipe"] != "near") | (rows["document"] == "needle")]
    table = shown.recipes(rows)
    by_section = {}
    for line in table.rows:
        by_section.setdefault(line["section"], {})[line["recipe"]] = line
    both, alone = by_section.values()  # those of more questions first
    assert {*both} == {"full", "worse"} and both["worse"]["n"] == 240
    assert {*alone} == {"full", "near"} and alone["near"]["n"] == alone["full"]["n"] == 120
    # Against `full` on the same questions: over both tasks it would look better than it.
    assert (
        alone["near"]["right"].value == alone["full"]["right"].value > both["full"]["right"].value
    )
    assert "needle at 512" in [*by_section][1] and "harder" not in [*by_section][1]
    ((_, said),) = shown.findings(rows).items()
    assert [line.split("%")[1] for line in said if "The uncompressed" in line] == [
        " of 240 questions.", " of 120 questions."
    ]  # fmt: skip
    assert len([ax for ax in shown.figure(rows).canvas.axes if ax.collections]) == 2


def test_a_depth_that_does_not_count_is_grey(tmp_path):
    made_up(tmp_path, bad_depth=True)  # the first fifth of the document is never answered
    picture = shown.depth_figure(load(tmp_path).rows)
    shades = [ax.images[0].get_array() for ax in picture.canvas.axes if ax.images]
    assert len(shades) == 3
    for shade in shades:
        assert np.ma.masked_invalid(shade).mask[:, 0].tolist() == [True, False, False, False, False]


def test_a_control_that_was_not_run_leaves_the_task_out(tmp_path):
    made_up(tmp_path)
    rows = load(tmp_path).rows
    ((_, (task,)),) = by_run(rows[rows["given"] != NOTHING])
    assert "not asked" in task.why_not


def test_the_same_questions_under_two_readers_are_not_pooled(tmp_path):
    made_up(tmp_path)
    made_up(tmp_path, reader="dequantize")
    rows = load(tmp_path).rows
    assert {line["n"] for line in shown.recipes(rows).rows} == {120}
    assert len(shown.findings(rows)) == 2
