"""The bounded part of `python -m reliability`: every finding survived; and the trials can tell what did not."""

import json
import multiprocessing
import signal
import sys
import time

import pytest

from polykv import results
from reliability import __main__ as reliability
from reliability import again, bad_input, damage, disk, kills, limits, sharing, stage
from reliability.finding import Finding


def check(findings):
    assert findings
    failed = [
        f"{finding.tried}: {finding.answered}" for finding in findings if not finding.survived
    ]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("part", [kills, disk, limits, sharing, damage])
def test_a_disturbed_sweep_ends_with_the_undisturbed_table(part):
    check(part.run(quick=True))


@pytest.mark.parametrize("start", range(4))  # parts, for the processes that share the suite
def test_bad_input_is_one_line_that_names_the_thing_and_exit_2(start):
    mistakes = filter(bad_input.applies, bad_input.MISTAKES[start::4])
    check([bad_input.answer(mistake) for mistake in mistakes])


def test_moments_cover_the_whole_sweep_and_all_of_writing_and_are_the_same_again():
    moments = kills.moments(50)
    assert moments == kills.moments(50) and len(set(moments)) == 50
    uniform = [moment.share for moment in moments if not moment.step]
    assert [int(share * 25) for share in uniform] == list(range(25))
    assert {moment.step for moment in moments} == {"", "writing", "fsync", "rename", "renamed"}
    assert {moment.nth for moment in moments} == {0, 1, 2, 3, 4}


def test_a_table_that_differs_in_one_digit_is_noticed(tmp_path, monkeypatch):
    row = dict.fromkeys(results.COLUMNS) | {"metric": "perplexity", "value": 2.5, "unit": "ppl"}
    for folder, value in (("right", 2.5), ("wrong", 2.5000000000000004)):
        results.Store(tmp_path / folder).write("e", "c", {}, [row | {"value": value}])
    monkeypatch.setattr(again, "undisturbed", lambda sweep: stage.table(tmp_path / "right"))
    assert again.differs(tmp_path / "right", "it") == []
    assert again.differs(tmp_path / "wrong", "it") == ["it: another table"]
    (tmp_path / "right" / "cells" / "e" / ".c.json.0123").write_text("half")
    assert "left behind" in again.differs(tmp_path / "right", "it")[0]


def test_an_answer_of_two_lines_or_with_files_written_is_a_failure(monkeypatch):
    def given(overrides, *injections):
        folder = overrides[-1].removeprefix("results_dir=")
        results.Store(folder).write("e", "c", {}, [])
        return stage.Answer(1, "", "Traceback ...\nerror: n_agents=0", 0.1)

    monkeypatch.setattr(stage, "run", given)
    finding = bad_input.answer(bad_input.BadInput("nobody", "n_agents=0", "n_agents=0"))
    assert not finding.survived
    for problem in ("exit 1", "2 lines", "written"):
        assert problem in finding.answered


def test_interrupts_are_told_apart_from_crashes():
    def judged(code, err, n_signals=1, went_s=0.1):
        stop = kills.Stop("drawing", stage.Answer(code, "", err, 1.0), went_s, [])
        return kills.unclean(stop, n_signals, "it")

    assert judged(130, kills.STOPPED) == []
    assert judged(1, "Traceback\nKeyboardInterrupt") and judged(130, f"Traceback\n{kills.STOPPED}")
    assert judged(-signal.SIGINT, "", n_signals=2) == []
    assert judged(-signal.SIGINT, "", n_signals=2, went_s=10.0) and judged(0, "", n_signals=2)


@pytest.fixture
def parts(monkeypatch):
    """Two parts of the suite, one of which breaks as often as it is told to."""

    class Part:
        def __init__(self, answers):
            self.answers, self.calls = answers, 0

        def run(self, quick):
            self.calls += 1
            survived = self.answers.pop(0)
            if survived is None:
                raise OSError("no such machine")
            return [Finding("area | pipe", "tried\nit", 3, "answered", survived, 0.5)]

    found = {"good": Part([True]), "weak": Part([None, False, True])}
    for name, part in found.items():
        monkeypatch.setitem(sys.modules, f"reliability.{name}", part)
    monkeypatch.setattr(reliability, "PARTS", {name: (name,) for name in found})
    monkeypatch.setattr(reliability, "commit", lambda: "0123456789ab")
    return found


def test_the_report_goes_on_where_it_stopped_and_shows_what_failed(parts, tmp_path, capsys):
    arguments = ["--quick", "--out", str(tmp_path)]
    codes = [reliability.main(arguments) for _ in range(3)]
    assert codes == [1, 1, 0]
    assert (parts["good"].calls, parts["weak"].calls) == (1, 3)
    page = (tmp_path / "reliability.md").read_text()
    assert "2 kinds of trouble, 6 times" in page and "None failed." in page
    assert page.count("| tried it | 3 | answered | yes | 0.5 |") == 2
    parts["weak"].answers = [False]
    (tmp_path / "reliability" / "weak.json").unlink()
    assert reliability.main([*arguments, "--only", "weak"]) == 1
    page = (tmp_path / "reliability.md").read_text()
    assert "**FAILED**" in page and "**1 of 2 trials failed.**" in page
    assert parts["good"].calls == 1 and "weak" in capsys.readouterr().out


def test_what_another_commit_found_does_not_count(parts, tmp_path, monkeypatch):
    reliability.run_part("good", True, tmp_path)
    assert reliability.load("good", True, tmp_path) and not reliability.load(
        "good", False, tmp_path
    )
    monkeypatch.setattr(reliability, "commit", lambda: "another")
    assert reliability.load("good", True, tmp_path) is None
    kept = tmp_path / "reliability" / "good.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"findings": [{"a": 1}]}))
    monkeypatch.setattr(reliability, "commit", lambda: "0123456789ab")
    assert reliability.load("good", True, tmp_path) is None


def _hold(root, ready):
    with results.Store(root).claim("e", "c"):
        ready.set()
        time.sleep(60)


def test_the_claim_of_a_killed_process_is_free_and_its_leftovers_are_gone(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    folder = tmp_path / "cells" / "e"
    (folder / ".c.json.0123").write_text("half")
    store = results.Store(tmp_path)
    with store.claim("e", "c") as mine:
        assert not mine
    holder.kill()
    holder.join()
    assert (folder / "c.lock").exists() and not store.done("e", "c")
    with store.claim("e", "c") as mine:
        assert mine and [path.name for path in folder.iterdir()] == ["c.lock"]
    assert list(folder.iterdir()) == []
