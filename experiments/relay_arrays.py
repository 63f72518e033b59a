"""Relays and comparisons of their replays as named arrays, the form in which parts are saved (polykv/parts.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polykv.evaluation.continuation import Comparison
from polykv.evaluation.per_token import METRICS
from polykv.handoff.relay import Turn
from polykv.parts import Arrays

SCORES = ("nll_full", "nll", "kl")  # of a Comparison, beside METRICS


@dataclass(frozen=True)
class Played:
    """The relay of one problem: its turns, and the bits of each of its cards (`Handoff.bits`)."""

    turns: list[Turn]
    bits: list[tuple[float, float]]


def of_played(relays: Sequence[Played]) -> Arrays:
    """Arrays from which `to_played` makes these relays."""
    found: dict[str, np.ndarray] = {}
    for number, relay in enumerate(relays):
        found[f"{number}.bits"] = np.array(relay.bits, np.float64).reshape(-1, 2)
        for hop, turn in enumerate(relay.turns):
            found[f"{number}.{hop}.prompt"] = turn.prompt_T.numpy()
            found[f"{number}.{hop}.answer"] = turn.answer_T.numpy()
    return found


def to_played(arrays: Arrays, n_turns: int) -> list[Played]:
    """Relays of `n_turns` turns, from their arrays."""

    def ids(name: str) -> Tensor:
        return torch.from_numpy(arrays[name])

    return [
        Played(
            [Turn(ids(f"{n}.{hop}.prompt"), ids(f"{n}.{hop}.answer")) for hop in range(n_turns)],
            [(tensors, file) for tensors, file in arrays[f"{n}.bits"].tolist()],
        )
        for n in range(sum(name.endswith(".bits") for name in arrays))
    ]


def of_compared(ways: Sequence[Sequence[Comparison]]) -> Arrays:
    """Arrays from which `to_compared` makes these comparisons, a list by way and by turn."""
    found: Mapping[str, Mapping[str, np.ndarray]] = {
        f"{way}.{hop}": {**{name: getattr(one, name) for name in SCORES}, **one.others}
        for way, turns in enumerate(ways)
        for hop, one in enumerate(turns)
    }
    return {f"{place}.{name}": x for place, of in found.items() for name, x in of.items()}


def to_compared(arrays: Arrays, n_ways: int, n_turns: int) -> list[list[Comparison]]:
    """Comparisons by way and by turn, from their arrays."""

    def one(place: str) -> Comparison:
        others = {name: arrays[f"{place}.{name}"] for name in METRICS}
        return Comparison(*(arrays[f"{place}.{name}"] for name in SCORES), others)

    return [[one(f"{way}.{hop}") for hop in range(n_turns)] for way in range(n_ways)]
