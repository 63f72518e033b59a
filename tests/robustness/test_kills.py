"""A sweep that is stopped at any moment, by kill -9, Ctrl-C once or twice; then run again."""

import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import psutil
import pytest

from robustness import stage
from robustness.stage import LAUNCHERS, N_CELLS, OF_A_CELL, PHASES

PROMPT_S = 3.0  # in which a second Ctrl-C is answered


@dataclass(frozen=True)
class Moment:
    """When to strike: after `share` of the phase's time, when it begins for the `nth` time."""

    phase: str
    nth: int
    share: float

    def __str__(self) -> str:
        return f"{self.phase}{self.nth}-{self.share:.2f}"


def moments() -> list[Moment]:
    """Each phase of each cell, and as many moments before the first and after the last; the same every time."""
    generator = random.Random(9)
    return [
        Moment(phase, nth if phase in OF_A_CELL else 1, generator.random())
        for nth in range(1, N_CELLS + 1)
        for phase in PHASES
    ]


# Under joblib the workers live on for a while, or die with the process, as when a node restarts.
WAYS = [("sequential", False), ("joblib", False), ("joblib", True)]
IN_TEST_ALL = {("sequential", False, "rename", 2), ("joblib", True, "measuring", 2)}
CASES = [
    pytest.param(
        *(launcher, group, moment),
        marks=(
            pytest.mark.slow
            if (launcher, group, moment.phase, moment.nth) in IN_TEST_ALL
            else pytest.mark.faults
        ),
        id=f"{launcher}-{'group' if group else 'alone'}-{moment}",
    )
    for launcher, group in WAYS
    for moment in moments()
]


@pytest.mark.parametrize(("launcher", "group", "moment"), CASES)
def test_a_killed_sweep_runs_on(launcher, group, moment, tmp_path):
    stop = stopped(launcher, tmp_path, moment, [signal.SIGKILL], group)
    stage.resume(tmp_path / "results", launcher)
    for worker in stop.workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()


@pytest.mark.faults
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("moment", moments()[::3], ids=str)
@pytest.mark.parametrize("n_signals", [1, 2])
def test_ctrl_c_once_ends_with_one_line_and_twice_at_once(n_signals, moment, launcher, tmp_path):
    stop = stopped(launcher, tmp_path, moment, [signal.SIGINT] * n_signals, group=True)
    if stop.too_late:
        assert stop.answer.code == 0
    elif n_signals == 1:
        assert stop.answer.code == 130 and "Traceback" not in stop.answer.err, stop
        assert any(line.startswith("stopped") for line in stop.answer.err.splitlines())
    else:
        assert stop.answer.code in (130, -signal.SIGINT) and stop.went_s < PROMPT_S, stop
    stage.resume(tmp_path / "results", launcher)


@dataclass(frozen=True)
class Stop:
    """How a run was stopped and what it left."""

    answer: stage.Answer
    too_late: bool  # it had ended before
    went_s: float  # from the last signal to its end
    workers: list[psutil.Process]  # that it had; some may have outlived it


def stopped(launcher, folder, moment, signals, group) -> Stop:
    """Start the sweep into `folder`/results, and send `signals` at that moment."""
    root, place = folder / "results", folder / "phase"
    traced, full = partial(stage.traced, place), moment.phase == "drawing"
    sweep = stage.Run(stage.in_folder(root, launcher), traced, full=full)
    times, was = 0, ""
    while times < moment.nth and not sweep.wait(0.005):
        now = stage.phase(place)
        times += now == moment.phase != was
        was = now
    too_late = sweep.wait(moment.share * PHASES[moment.phase])
    workers = sweep.workers()
    for number, one in enumerate(signals):
        if number:
            sweep.wait(0.1)
        sweep.signal(one, group=group)
    last = time.monotonic()
    sweep.wait(stage.PATIENCE_S)
    went_s = time.monotonic() - last
    return Stop(sweep.end(spare_workers=True), too_late, went_s, workers)
