"""Policy: how a card stores its tokens; one YAML of conf/policy each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from polykv import config
from polykv.codecs.base import Codec
from polykv.codecs.trellis import TrellisKey, TrellisValue
from polykv.codecs.turboquant_log import TurboQuantLog
from polykv.codecs.waterfill import WaterfillKey
from polykv.errors import PolyKVError
from polykv.geometry import Geometry
from polykv.handoff.mixed import TIERS
from polykv.handoff.signals import DEMAND, IMPORTANCE, OF_TOKENS, Sender, combined
from polykv.recipe import codec_of
from polykv.supported import check_attends

# mixed: bits by token under a budget; codecs: all tokens alike under it; float16, model: every token in fp16, or in the
# model's own dtype; text: no card, the receiver reads the text again.
STORES = ("mixed", "codecs", "float16", "model", "text")
# Those that cards know, of keys and values, by their payload's kind; the budget sets their bits.
CODECS: Mapping[str, tuple[WaterfillKey, TurboQuantLog]] = {
    "waterfill": (WaterfillKey(), TurboQuantLog()),
    "trellis": (TrellisKey(), TrellisValue()),
}
OFFERED = (3, 4, 8, 16)  # bits, by default: two bits ruin answers where tokens weigh the same
# What a receiver gets. All but the sender's own cache are controls of relays: the cache of another problem's relay,
# that of as many random tokens, or no card at all.
OWN, OTHER_PROBLEM, RANDOM_TOKENS, NOTHING = "own", "other_problem", "random_tokens", "nothing"
CARRIES = (OWN, OTHER_PROBLEM, RANDOM_TOKENS, NOTHING)
FLOOR = 0.01  # of the mean score, added before taking the inverse


@dataclass(frozen=True)
class Policy:
    """How tokens are scored, S(t) = alpha I(t) + (1 - alpha) T(t), and what their bits may be.

    `importance` and `demand` name the signals of I and T (polykv/handoff/signals.py). `tiers` are the bits on offer.
    `inverse`, a control, favours the least important tokens. `carries` is one of CARRIES. Under store `codecs` no token
    is scored, and `codecs` have to be one of the pairs in CODECS.

    Raises:
        PolyKVError: an unknown store, signal or content, or an invalid alpha or tiers.
    """

    name: str
    store: str = "mixed"
    importance: tuple[str, ...] = ()
    demand: tuple[str, ...] = ()
    alpha: float = 1.0
    tiers: tuple[int, ...] = OFFERED
    inverse: bool = False
    carries: str = OWN
    codecs: tuple[Codec, ...] = ()

    def __post_init__(self) -> None:
        def refuse(what: str, known: object) -> None:
            raise PolyKVError(f"policy {self.name!r}: {what}; there are: {known}")

        if self.store not in STORES:
            refuse(f"no store {self.store!r}", ", ".join(STORES))
        if self.carries not in CARRIES:
            refuse(f"carries={self.carries!r} is not known", ", ".join(CARRIES))
        for given, known in ((self.importance, IMPORTANCE), (self.demand, DEMAND)):
            for name in given:
                if name not in known:
                    refuse(f"no signal {name!r}", ", ".join(known))
        if not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            refuse(f"alpha={self.alpha}", "numbers from 0 to 1")
        if list(self.tiers) != [bits for bits in TIERS if bits in self.tiers] or not self.tiers:
            refuse(f"tiers={list(self.tiers)}", f"{list(TIERS)} or some of them, in this order")
        if self.codecs not in (CODECS.values() if self.store == "codecs" else [()]):
            pairs = " or ".join(str(list(pair)) for pair in CODECS.values())
            refuse(f"codecs={list(self.codecs)}", f"{pairs}, for store 'codecs'")

    @classmethod
    def from_config(cls, settings: Mapping[str, Any]) -> "Policy":
        """Built from the settings of a YAML of conf/policy.

        Raises:
            PolyKVError: unknown settings or signals.
        """
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                hint = config.did_you_mean(name, known)
                raise PolyKVError(f"a policy has no setting {name!r}{hint}")

        def is_list(value: Any) -> bool:
            return isinstance(value, Sequence) and not isinstance(value, str)

        given: dict[str, Any] = {k: tuple(v) if is_list(v) else v for k, v in settings.items()}
        if "codecs" in given:
            given["codecs"] = tuple(codec_of(dict(codec)) for codec in given["codecs"])
        return cls(**given)

    @property
    def has_budget(self) -> bool:
        return self.store in ("mixed", "codecs")

    @property
    def kind(self) -> str:
        """The name in CODECS of its codecs, for store `codecs`."""
        return next(kind for kind, pair in CODECS.items() if pair == self.codecs)

    def check_windows(self, model_config: Any) -> None:
        """Check that a model has no sliding windows or states, if the policy cannot store the caches of one that has.

        Raises:
            PolyKVError: names what of the policy takes full attention only, or windows and states in one model.
        """
        geometry = Geometry.of(model_config)
        if any(geometry.windows):
            check_attends(model_config, "a card of sliding windows")
        signals = self.importance + (self.demand if self.alpha < 1 else ())
        needs = [f"signal {name}" for name in signals if name not in OF_TOKENS]
        needs += [f"store {self.store}"] if self.store == "codecs" else []
        if needs and (any(geometry.windows) or geometry.stateful):
            raise PolyKVError(
                f"policy {self.name!r} has {needs[0]}, for models whose layers all attend to every token, and "
                f"{model_config.model_type} has {'states' if geometry.stateful else 'sliding windows'}; use policy "
                "uniform, random, sinks_recent, fp16 or full"
            )

    def score(self, sender: Sender) -> np.ndarray:
        """S(t) of every token, (tokens,), non-negative."""
        score = combined(self.importance, IMPORTANCE, sender)
        if self.alpha < 1:
            demand = combined(self.demand, DEMAND, sender)
            score = self.alpha * score + (1 - self.alpha) * demand
        return 1 / (score + FLOOR * score.mean()) if self.inverse else score


def load_policy(name: str) -> Policy:
    """A policy by its name in conf/policy.

    Raises:
        PolyKVError: an unknown name, or an invalid YAML.
    """
    return Policy.from_config(config.load_group("policy", name))
