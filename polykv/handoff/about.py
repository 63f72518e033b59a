"""What a card says of itself, written by the sender and checked by the reader."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any

from polykv.codecs.identity import DTYPES
from polykv.errors import PolyKVError
from polykv.geometry import Geometry
from polykv.handoff import fingerprint
from polykv.handoff.cardfile import CardError
from polykv.handoff.mixed import MixedCodec
from polykv.handoff.packing import DTYPE_NAMES
from polykv.handoff.policy import Policy
from polykv.handoff.signals import Sender

MOST = 1 << 31  # of any count; what is possible for the model is checked when it is known
LABEL = 128  # characters
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class About:
    """What a card says of itself. `exact` is the dtype of its 16-bit tier (None: the model's own).

    `sender` and `policy` are labels: printable, and safe to use as a file's name. Only a signature makes
    any of this true (`polykv.handoff.signing`).

    Raises:
        PolyKVError: a label, number or digest that no card may have.
    """

    model: str
    tokenizer: str
    n_layers: int
    n_kv_heads: int
    head_dim: int
    dtype: str
    exact: str | None
    group_size: int
    n_tokens: int
    position_offset: int
    policy: str
    budget_bits: float | None
    sender: str
    hop: int
    parent: str | None

    _TYPES = {"int": (int,), "str": (str,), "str | None": (str, NoneType)} | {
        "float | None": (float, NoneType)
    }

    def __post_init__(self) -> None:
        sizes = (self.n_layers, self.n_kv_heads, self.head_dim, self.group_size, self.n_tokens)
        known = self.dtype in DTYPES and (self.exact is None or self.exact in DTYPES)
        if not all(1 <= n < MOST for n in (*sizes, self.hop)) or not known:
            raise PolyKVError("the card's geometry, hop or dtype is not possible; seal it again")
        if not 0 <= self.position_offset < MOST:
            raise PolyKVError("position_offset of a card takes a whole number from 0 up")
        if self.budget_bits is not None and not 0 < self.budget_bits < math.inf:
            raise PolyKVError("budget_bits of a card takes a number of bits such as 4.0")
        if self.parent is not None and not _DIGEST.fullmatch(self.parent):
            raise PolyKVError("the parent of a card takes the digest of another; seal it again")
        for name in ("sender", "policy"):
            label = getattr(self, name)
            odd = not label.isprintable() or label.startswith(".") or {*label} & {*"/\\"}
            if odd or len(label) > LABEL:
                raise PolyKVError(
                    f"the card's {name} {label[:40]!a} is no label; give up to {LABEL} printable "
                    "characters without / and \\ that do not start with a dot"
                )

    @classmethod
    def parse(cls, given: dict[str, Any]) -> About:
        """From the fields of a file.

        Raises:
            CardError: a field is missing, unknown, or of another type or range.
        """
        expected = {field.name: str(field.type) for field in fields(cls)}
        if set(given) != set(expected):
            raise CardError("the card's fields are not those of its version; seal it again")
        for name, kind in expected.items():
            if type(given[name]) not in cls._TYPES[kind]:
                raise CardError(f"the card's field {name} is no {kind}; seal it again")
        try:
            return cls(**given)
        except PolyKVError as error:
            raise CardError(str(error)) from error

    @classmethod
    def of(
        cls,
        sending: Sender,
        tokenizer: Any,
        policy: Policy,
        codec: MixedCodec,
        budget_bits: float,
        name: str,
        position_offset: int,
    ) -> About:
        """What a first card says; `name` is how the sender calls itself."""
        g = Geometry.of(sending.model.config)
        n_kv_heads, head_dim = g.shape
        return cls(
            model=fingerprint.of_model(sending.model),
            tokenizer=fingerprint.of_tokenizer(tokenizer),
            n_layers=g.n_layers,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            dtype=DTYPE_NAMES[sending.cache.layers[0].keys.dtype],
            exact=codec.exact,
            group_size=codec.group_size,
            n_tokens=sending.n_tokens,
            policy=policy.name,
            budget_bits=float(budget_bits) if policy.has_budget else None,
            position_offset=position_offset,
            sender=name,
            hop=1,
            parent=None,
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one side, all layers: (1, layers * heads, tokens, head_dim)."""
        return (1, self.n_layers * self.n_kv_heads, self.n_tokens, self.head_dim)
