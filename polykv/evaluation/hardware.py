"""Devices as their data sheets have them (conf/hardware), and what one copy of a model gets of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polykv.errors import PolyKVError
from polykv.evaluation.memory import GB


@dataclass(frozen=True)
class Hardware:
    """A data sheet (conf/hardware): `nodes` of `devices` each; the other figures are of one device."""

    name: str
    nodes: int
    devices: int
    memory_gb: float
    usable: float  # part of the memory that weights and caches may take
    bandwidth_gb_s: float
    tflops: Mapping[str, float]  # dense, by dtype

    @classmethod
    def from_config(cls, sheet: Mapping[str, Any]) -> "Hardware":
        """Built from the settings of a YAML of conf/hardware.

        Raises:
            PolyKVError: a figure is missing or impossible.
        """
        if missing := [name for name in cls.__dataclass_fields__ if sheet.get(name) is None]:
            raise PolyKVError(
                f"hardware {sheet.get('name')!r} has no {', '.join(missing)}; add it to its file in conf/hardware"
            )
        figures = {name: sheet[name] for name in cls.__dataclass_fields__}
        figures["tflops"] = dict(sheet["tflops"].items())
        for name in ("nodes", "devices"):
            if not isinstance(figures[name], int) or figures[name] < 1:
                raise PolyKVError(
                    f"hardware.{name}={figures[name]!r}; give a whole number from 1 up"
                )
        for name in ("memory_gb", "bandwidth_gb_s"):
            check_number(f"hardware.{name}", figures[name], 0)
        for dtype, figure in figures["tflops"].items():
            check_number(f"hardware.tflops.{dtype}", figure, 0)
        check_number("hardware.usable", figures["usable"], 0, 1)
        return cls(**figures)

    def replica(
        self, n_kv_heads: int, dtype: str, bandwidth_fraction: float, flops_fraction: float
    ) -> "Replica":
        """One copy of a model on as many devices of a node as share its kv heads evenly, none of them twice.

        The fractions are what a step gets of the data sheet's bandwidth and operations.

        Raises:
            PolyKVError: the YAML has no peak for this dtype.
        """
        if dtype not in self.tflops:
            raise PolyKVError(
                f"conf/hardware/{self.name}.yaml has no tflops for {dtype}; add it, or use "
                f"model.dtype={' or '.join(self.tflops)}"
            )
        split = math.gcd(self.devices, n_kv_heads)
        return Replica(
            split=split,
            count=self.nodes * self.devices // split,
            usable_bytes=int(split * self.memory_gb * GB * self.usable),
            bandwidth=split * self.bandwidth_gb_s * GB * bandwidth_fraction,
            flops=split * self.tflops[dtype] * 1e12 * flops_fraction,
        )


def check_number(name: str, number: Any, above: float, most: float = math.inf) -> None:
    """Refuse what is no finite number above `above`, up to `most`.

    Raises:
        PolyKVError: names the setting.
    """
    fits = isinstance(number, int | float) and not isinstance(number, bool)
    if not fits or not above < number <= most or number == math.inf:
        limit = f", up to {most:g}" if most < math.inf else ""
        raise PolyKVError(f"{name}={number!r}; give a number above {above:g}{limit}")


@dataclass(frozen=True)
class Replica:
    """`split` devices that hold one copy of the weights, and `count` such copies; agents are dealt out evenly."""

    split: int
    count: int
    usable_bytes: int
    bandwidth: float  # bytes a second that a step gets
    flops: float  # operations a second that a step gets
