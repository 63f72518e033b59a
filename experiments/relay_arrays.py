"""Relays and comparisons of their replays as named arrays, the form in which parts are saved (polykv/parts.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polykv.evaluation.continuation import Comparison
from polykv.evaluation.per_token import METRICS
from polykv.handoff.relay import Turn
from polykv.parts import SECONDS, Arrays

SCORES = ("nll_full", "nll", "kl")  # of a Comparison, beside METRICS


@dataclass(frozen=True)
class Played:
    """The relay of one problem.

    Attributes:
        bits: of each of its cards (`Handoff.bits`).
        seconds: that playing it took, as its share of the batch.
    """

    turns: list[Turn]
    bits: list[tuple[float, float]]
    seconds: float = 0.0


def of_played(relays: Sequence[Played]) -> Arrays:
    """Arrays from which `to_played` makes these relays."""
    found: dict[str, np.ndarray] = {}
    for number, relay in enumerate(relays):
        found[f"{number}.bits"] = _of_bits(relay.bits)
        for hop, turn in enumerate(relay.turns):
            found[f"{number}.{hop}.prompt"] = turn.prompt_T.numpy()
            found[f"{number}.{hop}.answer"] = turn.answer_T.numpy()
    return found


def to_played(arrays: Arrays, n_turns: int) -> list[Played]:
    """Relays of `n_turns` turns, from their arrays."""

    def ids(name: str) -> Tensor:
        return torch.from_numpy(arrays[name])

    n_relays = sum(name.endswith(".bits") for name in arrays)
    return [
        Played(
            [Turn(ids(f"{n}.{hop}.prompt"), ids(f"{n}.{hop}.answer")) for hop in range(n_turns)],
            _to_bits(arrays[f"{n}.bits"]),
            float(arrays[SECONDS]) / n_relays,
        )
        for n in range(n_relays)
    ]


@dataclass(frozen=True)
class Replays:
    """Replays of one problem's relay: comparisons by way and by turn.

    Attributes:
        bits: of the first way's cards.
        seconds: that all the replays took.
    """

    ways: list[list[Comparison]]
    bits: list[tuple[float, float]]
    seconds: float = 0.0


def of_replays(replays: Replays) -> Arrays:
    """Arrays from which `to_replays` makes these."""
    found: Mapping[str, Mapping[str, np.ndarray]] = {
        f"{way}.{hop}": {**{name: getattr(one, name) for name in SCORES}, **one.others}
        for way, turns in enumerate(replays.ways)
        for hop, one in enumerate(turns)
    }
    arrays = {f"{place}.{name}": x for place, of in found.items() for name, x in of.items()}
    return arrays | {"bits": _of_bits(replays.bits)}


def to_replays(arrays: Arrays, n_ways: int, n_turns: int) -> Replays:
    """The replays of `n_ways` ways and `n_turns` turns, from their arrays."""

    def one(place: str) -> Comparison:
        others = {name: arrays[f"{place}.{name}"] for name in METRICS}
        return Comparison(*(arrays[f"{place}.{name}"] for name in SCORES), others)

    ways = [[one(f"{way}.{hop}") for hop in range(n_turns)] for way in range(n_ways)]
    return Replays(ways, _to_bits(arrays["bits"]), float(arrays[SECONDS]))


def _of_bits(bits: Sequence[tuple[float, float]]) -> np.ndarray:
    return np.array(bits, np.float64).reshape(-1, 2)


def _to_bits(array: np.ndarray) -> list[tuple[float, float]]:
    return [(tensors, file) for tensors, file in array.tolist()]
