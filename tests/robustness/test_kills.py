"""A sweep that is stopped at any moment, by kill -9, Ctrl-C once or twice; then run again."""

import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from robustness import injected, stage
from robustness.stage import first

PROMPT_S = 3.0  # in which a second Ctrl-C is answered


@dataclass(frozen=True)
class Moment:
    """When to strike: after `share` of the sweep's time; or, with a `step` of writing a cell, in its `nth` time."""

    share: float  # of the sweep's time, or of the pause in that step
    step: str = ""
    nth: int = 0

    def __str__(self) -> str:
        return f"{self.step}{self.nth or ''}-{self.share:.2f}"


def moments(times: int) -> list[Moment]:
    """In turn one in each equal slice of the sweep's time, and one in a step of writing some cell."""
    generator = random.Random(9)
    n_uniform = times - times // 2
    uniform = [Moment((slice_ + generator.random()) / n_uniform) for slice_ in range(n_uniform)]
    writing = [
        Moment(generator.random(), step, generator.randint(1, stage.N_CELLS))
        for step, _ in zip(cycle(injected.WRITING), range(times // 2), strict=False)
    ]
    return list(chain(*zip(uniform, writing, strict=True)))


# Under joblib the workers live on for a while, or die with the process, as when a node restarts.
CASES = [("sequential", False, moment) for moment in moments(50)]
CASES += [("joblib", group, moment) for moment in moments(26) for group in (False, True)]
IN_TEST = (
    0,
    1,
    50,
    51,
)  # sequential at any time and while writing; joblib alone and with its workers
CASES = [CASES[i] for i in IN_TEST] + [case for i, case in enumerate(CASES) if i not in IN_TEST]


@pytest.mark.parametrize(("launcher", "group", "moment"), first(len(IN_TEST), CASES), ids=str)
def test_a_killed_sweep_runs_on(launcher, group, moment, tmp_path):
    stop = stopped(launcher, tmp_path, moment, [signal.SIGKILL], group)
    stage.resume(tmp_path / "results", launcher)
    for worker in stop.workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()


@pytest.mark.faults
@pytest.mark.parametrize("launcher", stage.LAUNCHERS)
@pytest.mark.parametrize("moment", moments(10), ids=str)
@pytest.mark.parametrize("n_signals", [1, 2])
def test_ctrl_c_once_ends_with_one_line_and_twice_at_once(n_signals, moment, launcher, tmp_path):
    stop = stopped(launcher, tmp_path, moment, [signal.SIGINT] * n_signals, group=True)
    if n_signals == 1:
        assert stop.answer.code == 130 and "Traceback" not in stop.answer.err, stop
        assert any(line.startswith("stopped") for line in stop.answer.err.splitlines())
    else:
        assert stop.answer.code in (130, -signal.SIGINT) and stop.went_s < PROMPT_S, stop
    stage.resume(tmp_path / "results", launcher)


@dataclass(frozen=True)
class Stop:
    """How a run was stopped and what it left."""

    answer: stage.Answer
    went_s: float  # from the last signal to its end
    workers: list[psutil.Process]  # that it had; some may have outlived it


def stopped(launcher, folder, moment, signals, group) -> Stop:
    """Start the sweep into `folder`/results, and send `signals` at that moment.

    A sweep that was faster than usual and had ended is started again, to be stopped a little sooner.
    """
    root, place = folder / "results", folder / "phase"
    took = duration(launcher)
    traced = [partial(injected.traced, place), *stage.FORKS[launcher]]
    sweep = stage.Run(stage.in_folder(root, *stage.LAUNCHERS[launcher]), traced)
    if moment.step:
        reach(sweep, place, moment)
    if sweep.wait(moment.share * (injected.PAUSE_S if moment.step else took)):
        sweep.end()
        shutil.rmtree(root)
        return stopped(launcher, folder, replace(moment, share=0.9 * moment.share), signals, group)
    workers = sweep.workers()
    for number, one in enumerate(signals):
        if number:
            sweep.wait(0.1)
        sweep.signal(one, group=group)
    last = time.monotonic()
    sweep.wait(stage.PATIENCE_S)
    went_s = time.monotonic() - last
    return Stop(sweep.end(spare_workers=True), went_s, workers)


def reach(sweep, place, moment):
    """Wait until that step of writing begins for the `nth` time."""
    times, before = 0, ""
    while times < moment.nth and not sweep.wait(0.005):
        now = injected.phase(place)
        times += now == moment.step != before
        before = now


@cache
def duration(launcher) -> float:
    """Seconds of a traced sweep that is not stopped."""
    stage.undisturbed()  # before the clock starts: the first run of all imports what others find
    with TemporaryDirectory(prefix="polykv-duration-") as folder:
        folder = Path(folder)
        traced = [partial(injected.traced, folder / "phase"), *stage.FORKS[launcher]]
        overrides = stage.in_folder(folder / "results", *stage.LAUNCHERS[launcher])
        return stage.run(overrides, *traced).seconds


def test_moments_cover_the_sweep_and_all_steps_of_writing_and_are_the_same_again():
    found = moments(50)
    assert found == moments(50) and len(set(found)) == 50
    assert [int(one.share * 25) for one in found if not one.step] == list(range(25))
    assert {one.step for one in found} == {"", *injected.WRITING}
    assert {one.nth for one in found} == {0, 1, 2, 3, 4}
