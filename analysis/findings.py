"""One page of findings in plain sentences: both papers' claims with their verdicts, then our own questions.

Every number comes from the rows. A verdict holds for the weights and the device that it names and for no others.
"""

import textwrap

import pandas as pd

from analysis import catalog
from analysis.published import PAPERS

STUDY = catalog.EVERY
WIDTH = 100


def text(rows: pd.DataFrame) -> str | None:
    """Markdown; None where no row speaks to a claim or to a question of ours."""
    claims, own = catalog.claims(rows), catalog.findings(rows)
    if not own and not any(claim.measured for claim in claims):
        return None
    parts = ["# Findings"]
    for paper, name in PAPERS.items():
        mine = [claim for claim in claims if claim.paper == paper]
        judged = [claim.markdown() for claim in mine if claim.measured]
        if judged:
            parts += [f"## {name}'s claims", *map(_bullet, judged)]
        if n_open := len(mine) - len(judged):
            parts.append(
                f"{n_open} {'more ' * bool(judged)}claims of {name} were not measured here: published_{paper} says "
                "why, figure by figure."
            )
    for heading, lines in own.items():
        parts += [f"## {heading}", *map(_bullet, lines)]
    return "\n\n".join(parts) + "\n"


def _bullet(line: str) -> str:
    return textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ")


TEXTS = {"findings": text}
