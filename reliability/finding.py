"""What one trial found; every part of this package returns a list of these."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One kind of trouble, tried on purpose.

    Attributes:
        area: the heading it stands under, e.g. `kill -9`.
        tried: what was done to the harness, in words.
        times: how often (50 kills, 1,000,000 executions, 64 threads).
        answered: what the harness did or said; for a bad input, its one line.
        survived: every promise held. False is shown as failed and makes the whole run fail.
        seconds: wall time of the trial.
    """

    area: str
    tried: str
    times: int
    answered: str
    survived: bool
    seconds: float
