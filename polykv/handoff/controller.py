"""Controller: a small trained network that says how much an error in a token's keys and values matters.

After the controllers of Don't Waste Bits (arXiv 2604.04722: token frequency, quality score, attention variance,
entropy) and QKVShare (arXiv 2605.03884; according to a secondary digest: the same, downstream demand and segment type;
a two-layer network of about 512 parameters that chooses 2, 4, 8 or 16 bits under a budget). Neither paper's weights are
published, and we know neither paper's exact features, targets or loss: ours are in polykv/handoff/signals.py and
polykv/handoff/training.py.

Ours too: the network gives one weight per token, and polykv/handoff/allocate.py chooses the bits, as it does for every
policy, so that the same weights serve every budget and the budget is kept to the bit. With 64 hidden units and six
features it has 512 parameters (384 with four); there is no output bias, since allocation depends on ratios alone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parents[1] / "data"  # weights, with a README
FEATURES = {
    "dont_waste_bits": ("rarity", "quality", "attention_variance", "entropy"),
    "qkvshare": ("rarity", "quality", "attention_variance", "entropy", "downstream", "segment"),
}
HIDDEN = 64
FLOOR = 1e-3  # of a signal's mean, added before the logarithm


@dataclass(frozen=True, eq=False)
class Controller:
    """A two-layer network on signals that are normalized by `mean` and `spread`.

    Attributes:
        features: names of signals.
        mean, spread: (F,) of `log_ratios` in the training data.
        hidden: (F, HIDDEN), with bias (HIDDEN,); tanh.
        output: (HIDDEN,).
        provenance: how the weights were made.
    """

    features: tuple[str, ...]
    mean: np.ndarray
    spread: np.ndarray
    hidden: np.ndarray
    hidden_bias: np.ndarray
    output: np.ndarray
    provenance: Mapping[str, Any]

    def __call__(self, signals_FT: np.ndarray) -> np.ndarray:
        """The weight of every token, (T,), positive; only ratios of weights mean anything."""
        inputs_TF = (log_ratios(signals_FT).T - self.mean) / self.spread
        return np.exp(np.tanh(inputs_TF @ self.hidden + self.hidden_bias) @ self.output)

    @property
    def n_parameters(self) -> int:
        """Trained numbers."""
        return self.hidden.size + self.hidden_bias.size + self.output.size

    def save(self, path: Path) -> None:
        """Write as JSON with six digits."""

        def plain(value: Any) -> Any:
            rounded = np.vectorize(lambda x: float(f"{x:.6g}"), otypes=[float])
            return rounded(value).tolist() if isinstance(value, np.ndarray) else value

        fields = {name: plain(value) for name, value in asdict(self).items()}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def log_ratios(signals_FT: np.ndarray) -> np.ndarray:
    """Logarithms of signals relative to their mean over the tokens, which have no unit; 0 for a signal of zeros."""
    mean_F1 = signals_FT.mean(axis=1, keepdims=True)
    return np.log(np.where(mean_F1 > 0, signals_FT / np.where(mean_F1 > 0, mean_F1, 1), 1) + FLOOR)


def read(path: Path) -> Controller:
    """A controller from its file."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    arrays = ("mean", "spread", "hidden", "hidden_bias", "output")
    fields |= {name: np.array(fields[name]) for name in arrays}
    return Controller(**fields | {"features": tuple(fields["features"])})


@cache
def load(name: str) -> Controller:
    """A controller of FEATURES, with the weights in this package."""
    return read(DATA / f"{name}.json")
