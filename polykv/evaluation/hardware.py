"""Hardware data sheets (conf/hardware), and the share of the hardware that one replica of a model gets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polykv.errors import PolyKVError
from polykv.evaluation.memory import GB


@dataclass(frozen=True)
class Hardware:
    """A data sheet: `nodes` with `devices` each; the other figures are per device."""

    name: str
    nodes: int
    devices: int
    memory_gb: float
    usable: float  # fraction of the memory available to weights and caches
    bandwidth_gb_s: float
    tflops: Mapping[str, float]  # dense peak by dtype

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
        """A replica of a model: split by kv heads (tensor parallelism) over as many devices of a node as divide them.

        The fractions say how much of the data sheet's bandwidth and peak a decode step reaches.

        Raises:
            PolyKVError: the data sheet has no peak for this dtype.
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
    """Check that a setting is a finite number in (above, most].

    Raises:
        PolyKVError: names the setting.
    """
    fits = isinstance(number, int | float) and not isinstance(number, bool)
    if not fits or not above < number <= most or number == math.inf:
        limit = f", up to {most:g}" if most < math.inf else ""
        raise PolyKVError(f"{name}={number!r}; give a number above {above:g}{limit}")


@dataclass(frozen=True)
class Replica:
    """A copy of the weights on `split` devices, of which there are `count`; agents are spread evenly over copies."""

    split: int
    count: int
    usable_bytes: int
    bandwidth: float  # bytes per second reached in a step
    flops: float  # operations per second reached in a step
