"""What is trained when: stages of growing length, left when the metric says so, not the clock."""

import random
from dataclasses import dataclass

from polykv.reference.world import Difficulty
from reference_model.rows import RowKind


@dataclass(frozen=True)
class Stage:
    """`mix` gives row kinds with their shares of the tokens; `gate` is the share of fact values
    (smoothed over about 100 steps) that must be found before the next stage begins."""

    gate: float
    mix: tuple[tuple[float, RowKind], ...]

    def draw(self, rng: random.Random) -> RowKind:
        shares, kinds = zip(*self.mix, strict=True)
        return rng.choices(kinds, shares)[0]


SHORT = RowKind(128, stated=(0.2, 0.5), facts_per_person=(1, 4), plain=0.3, problems=0.2)
ALONE = RowKind(160, stated=(0.3, 0.3), alone=1.0)
ALONE_WIDE = RowKind(160, stated=(1.0, 1.0), alone=1.0)  # enough prices for every template
TWO_FACTS = RowKind(  # what is learned last: which of two facts goes with which number
    160,
    stated=(1.0, 1.0),
    facts_per_person=(1, 2),
    worlds=Difficulty(unowned=0.6, owners_per_item=1),
    alone=1.0,
    templates=("basket", "both", "compare"),
)


def document(length: int, namesakes: float = 0.0) -> RowKind:
    """Rows of one document and its questions and problems."""
    return RowKind(length, worlds=Difficulty(namesakes=namesakes), plain=0.2, problems=0.4)


CPU = (
    Stage(0.90, ((0.5, SHORT), (0.2, ALONE), (0.3, document(256)))),
    Stage(0.95, ((0.15, SHORT), (0.35, ALONE), (0.35, document(256)), (0.15, document(512)))),
    Stage(
        0.99,
        ((0.05, SHORT), (0.3, ALONE), (0.35, document(256)), (0.2, document(512)))
        + ((0.1, document(1024)),),
    ),
    Stage(
        0.9987,
        ((0.03, SHORT), (0.32, ALONE), (0.25, document(256)), (0.15, document(512)))
        + ((0.15, document(1024)), (0.1, document(2048))),
    ),
    Stage(
        0.9899,
        ((0.35, ALONE_WIDE), (0.2, document(256)), (0.15, document(512)))
        + ((0.2, document(1024)), (0.1, document(2048))),
    ),
    Stage(
        1.01,
        ((0.4, TWO_FACTS), (0.15, ALONE_WIDE), (0.15, document(256)), (0.1, document(512)))
        + ((0.1, document(1024)), (0.1, document(2048))),
    ),
)

GPU = (
    *CPU[:2],
    Stage(
        0.96, ((0.1, SHORT), (0.2, ALONE_WIDE), (0.3, document(512)), (0.4, document(1024, 0.1)))
    ),
    Stage(
        1.01,
        ((0.05, TWO_FACTS), (0.15, ALONE_WIDE), (0.15, document(256)), (0.15, document(512, 0.1)))
        + ((0.15, document(1024, 0.1)), (0.15, document(2048, 0.1)), (0.2, document(4096, 0.1))),
    ),
)
