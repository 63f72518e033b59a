"""A sweep that is stopped from outside at any moment: kill -9, and Ctrl-C once and twice; then run again."""

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from tqdm import tqdm

from reliability import injected, stage
from reliability.again import outcome, resumed, undisturbed
from reliability.finding import Finding

SEED = 9
# Who is killed. Under joblib its workers live on for a while, or die with it, as a node's reboot has it.
VICTIMS = {"sequential": ("process",), "joblib": ("process", "process and workers")}
PROMPT_S = 3.0  # in which a second Ctrl-C is answered
STOPPED = "stopped; finished cells are kept, the same command goes on"


@dataclass(frozen=True)
class Moment:
    """When to strike: after `share` of the sweep's time; or, with a `step` of writing a cell, in its `nth` time."""

    share: float  # of the sweep's time, or of the pause in that step
    step: str = ""
    nth: int = 0

    def __str__(self) -> str:
        return f"{self.step or 'moment'} {self.nth or ''} {self.share:.2f}"


@dataclass(frozen=True)
class Stop:
    """How a run was stopped and what it left."""

    phase: str
    answer: stage.Answer
    went_s: float  # from the last signal to its end
    workers: list[psutil.Process]  # that it had; some may have outlived it


def run(quick: bool) -> list[Finding]:
    """All findings of this file."""
    if quick:
        return [kill("sequential", 2), kill("joblib", 1)]
    return [
        finding
        for launcher in stage.LAUNCHERS
        for finding in (kill(launcher, 50), interrupt(launcher, 1, 10), interrupt(launcher, 2, 5))
    ]


def kill(launcher: str, times: int) -> Finding:
    """SIGKILL at each of `moments(times)`."""
    start = time.monotonic()
    phases: Counter[str] = Counter()
    failures = []
    victims = VICTIMS[launcher]
    for number, moment in enumerate(tqdm(moments(times), desc=f"kill {launcher}", disable=None)):
        victim = victims[number % len(victims)]
        with TemporaryDirectory(prefix="polykv-kill-") as folder:
            root = Path(folder) / "results"
            stop = stopped(launcher, root, moment, [signal.SIGKILL], group=victim != victims[0])
            phases[stop.phase] += 1
            failures += resumed(root, f"{victim} at {moment}", launcher)
            for worker in stop.workers:
                with suppress(
                    psutil.NoSuchProcess
                ):  # psutil knows a number that was given away again
                    worker.kill()
    met = ", ".join(f"{phase} {phases[phase]}" for phase in injected.PHASES if phases[phase])
    return Finding(
        area="kill -9",
        tried=f"{launcher}: {' or '.join(victims)} killed, half at random moments of the whole "
        f"sweep, half in the writing of a cell (met: {met}); then run again",
        times=times,
        answered=outcome("same table to the byte, no finished cell measured again", failures),
        survived=not failures,
        seconds=time.monotonic() - start,
    )


def interrupt(launcher: str, n_signals: int, times: int) -> Finding:
    """Ctrl-C, to the process and its workers as a terminal sends it."""
    start = time.monotonic()
    failures = []
    for moment in tqdm(moments(times), desc=f"Ctrl-C {launcher}", disable=None):
        with TemporaryDirectory(prefix="polykv-interrupt-") as folder:
            root = Path(folder) / "results"
            stop = stopped(launcher, root, moment, [signal.SIGINT] * n_signals, group=True)
            what = f"at {moment} ({stop.phase})"
            failures += unclean(stop, n_signals, what)
            failures += resumed(root, what, launcher)
    clean = "one line, exit 130" if n_signals == 1 else f"gone within {PROMPT_S:g} s"
    return Finding(
        area="Ctrl-C",
        tried=f"{launcher}: {'once' if n_signals == 1 else 'twice'}, half at random moments of the "
        "whole sweep, half in the writing of a cell; then run again",
        times=times,
        answered=outcome(f"{clean}; finished cells kept, same table to the byte", failures),
        survived=not failures,
        seconds=time.monotonic() - start,
    )


def moments(times: int) -> list[Moment]:
    """Half of them uniform, one in each equal slice of the sweep's time; half in the writing of some cell."""
    generator = random.Random(SEED)
    n_writing = times // 2
    n_uniform = times - n_writing
    uniform = [Moment((slice_ + generator.random()) / n_uniform) for slice_ in range(n_uniform)]
    writing = [
        Moment(generator.random(), step, generator.randint(1, stage.N_CELLS))
        for step, _ in zip(cycle(injected.WRITING), range(n_writing), strict=False)
    ]
    return uniform + writing


def stopped(
    launcher: str, root: Path, moment: Moment, signals: Sequence[signal.Signals], group: bool
) -> Stop:
    """Start the sweep, and send `signals` at that moment.

    A sweep that was faster than usual and had ended is started again, to be stopped a little sooner.
    """
    place = root.parent / "phase"
    took = _duration(launcher)
    sweep = stage.Run(
        stage.in_folder(root, *stage.LAUNCHERS[launcher]), _injections(launcher, place)
    )
    if moment.step:
        _reach(sweep, place, moment)
    if sweep.wait(moment.share * (injected.PAUSE_S if moment.step else took)):
        sweep.end()
        shutil.rmtree(root)
        return stopped(launcher, root, replace(moment, share=0.9 * moment.share), signals, group)
    phase, workers = injected.phase(place), sweep.workers()
    for number, one in enumerate(signals):
        if number:
            sweep.wait(0.1)
        sweep.signal(one, group=group)
    last = time.monotonic()
    sweep.wait(stage.PATIENCE_S)
    went_s = time.monotonic() - last
    return Stop(phase, sweep.end(spare_workers=True), went_s, workers)


def _reach(sweep: stage.Run, place: Path, moment: Moment) -> None:
    """Wait until that step of writing begins for the `nth` time."""
    times, before = 0, ""
    while times < moment.nth and not sweep.wait(0.005):
        now = injected.phase(place)
        times += now == moment.step != before
        before = now


def unclean(stop: Stop, n_signals: int, what: str) -> list[str]:
    """What is wrong with how a run answered Ctrl-C: once with its line and 130, twice by being gone."""
    code, err = stop.answer.code, stop.answer.err
    if n_signals == 1 and code == 130 and STOPPED in err.splitlines() and "Traceback" not in err:
        return []
    if n_signals == 2 and code in (130, -signal.SIGINT) and stop.went_s < PROMPT_S:
        return []
    return [f"{what}: exit {code} after {stop.went_s:.1f} s, said {err.strip()[-200:]!r}"]


def _injections(launcher: str, place: Path) -> list[stage.Injection]:
    return [partial(injected.traced, place), *stage.FORKS[launcher]]


@cache
def _duration(launcher: str) -> float:
    """Seconds of a sweep that is watched and not stopped."""
    undisturbed(
        stage.SWEEP
    )  # before the clock starts: the first run of all imports what others find
    with TemporaryDirectory(prefix="polykv-duration-") as folder:
        overrides = stage.in_folder(Path(folder) / "results", *stage.LAUNCHERS[launcher])
        return stage.run(overrides, *_injections(launcher, Path(folder) / "phase")).seconds
