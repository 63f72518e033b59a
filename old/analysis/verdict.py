"""A claim of a paper with the verdict that the rows give, and how numbers are put into its sentence."""

from dataclasses import dataclass

from analysis.reduce import Value

YES, NO, OPEN = "reproduced", "not reproduced", "cannot be told here"
AGREES = "arithmetic agrees"  # computed from the same definitions: nothing was measured that could differ


@dataclass(frozen=True)
class Claim:
    """What one paper says, and what one set of weights (or any, or one device) says to it.

    `verdict` is YES, NO, OPEN or AGREES. `claim` ends in the weights or the device that the verdict holds for,
    where it holds for no others. `said` gives the numbers that decide; of an OPEN claim the reason, and
    the command that would tell. `measured` is False where no row speaks to the claim, so that it is OPEN for
    want of a run; an OPEN claim that is measured has numbers which do not decide it.
    """

    paper: str
    verdict: str
    claim: str
    said: str
    measured: bool = True

    def markdown(self) -> str:
        """One line."""
        return f"**{self.verdict}**: {self.claim}. {self.said}"


def equivalent(got: Value, low: float, high: float) -> str:
    """YES where the whole interval of `got` lies within low to high, NO where none of it does, else OPEN.

    Few data give a wide interval, which is OPEN, and never a YES.
    """
    if got.low is None or got.high is None:
        return OPEN
    if low <= got.low and got.high <= high:
        return YES
    return NO if got.high < low or high < got.low else OPEN


def sentence(said: str) -> str:
    return f"{said[0].upper()}{said[1:]}."


def with_interval(value: Value, form: str = ".4g") -> str:
    said = f"{value.value:{form}}"
    if value.low is None or value.high is None:
        return f"{said} (no interval)"
    return f"{said} [{value.low:{form}}, {value.high:{form}}]"


def p_said(p: float | None, how: str = "") -> str:
    return "" if p is None else f", p = {p:.2g}{how}"
