"""CardMetadata: the fields of a card's header, written by the sender and validated by the receiver."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Any

from polykv import config
from polykv.codecs.identity import DTYPES
from polykv.errors import PolyKVError
from polykv.geometry import Geometry
from polykv.handoff import fingerprint
from polykv.handoff.cardfile import CardError
from polykv.handoff.packing import DTYPE_NAMES
from polykv.handoff.payload import Payload
from polykv.handoff.policy import CODECS, Policy
from polykv.handoff.signals import Sender
from polykv.probe import kept_tokens
from polykv.recurrent import attending

MOST = 1 << 31  # bound of all counts; limits of the model are checked in verify.py
LABEL = 128  # characters of a label at most
LABELS = ("policy", "sender", "receiver", "session")
# Left out of the file if so.
OPTIONAL = {
    "receiver": "", "session": "", "payload": "mixed", "windows": None, "n_left": 0, "states": None,
}  # fmt: skip
PAYLOADS = ("mixed", *CODECS, "windowed", "stateful")  # Payload.kind (polykv/handoff/payload.py)
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class CardMetadata:
    """The metadata of a card: model, tokenizer, geometry, policy and origin.

    `model` and `tokenizer` are fingerprints. `exact` is the dtype of the 16-bit tier (None: the model's own). `policy`,
    `sender`, `receiver` and `session` are labels: printable, and safe as file names. `payload` says how the tensors are
    read. `windows` has the sliding window of each layer, None for full attention, and is None if all layers have that;
    layers with a window lack the first `n_left` of the `n_tokens`, which no later token sees. `states` has the numbers
    of the layers that keep a state and no tokens, None if there are none. Only a signature proves that the metadata are
    genuine (`polykv.handoff.signing`).

    Raises:
        PolyKVError: an invalid label, number or digest.
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
    receiver: str = ""
    session: str = ""
    payload: str = "mixed"
    windows: list[int | None] | None = None
    n_left: int = 0
    states: list[int] | None = None

    _TYPES = {"int": (int,), "str": (str,), "str | None": (str, NoneType)} | {
        "float | None": (float, NoneType),
        "list[int | None] | None": (list, NoneType),
        "list[int] | None": (list, NoneType),
    }

    def __post_init__(self) -> None:
        sizes = (self.n_layers, self.n_kv_heads, self.head_dim, self.group_size, self.n_tokens)
        known = self.dtype in DTYPES and (self.exact is None or self.exact in DTYPES)
        if self.payload not in PAYLOADS:
            raise PolyKVError(
                f"the card's payload is not one of {', '.join(PAYLOADS)}; update polykv"
            )
        windows = self.windows or []
        known &= all(w is None or type(w) is int and 2 <= w < MOST for w in windows)
        known &= len(windows) in (0, self.n_layers) and (self.payload == "windowed") == any(windows)
        states = self.states or []
        known &= all(type(number) is int for number in states) and (
            self.payload == "stateful"
        ) == bool(states)
        known = (
            known
            and states == sorted({*states} & {*range(self.n_layers)})
            and len(states) < self.n_layers
        )
        if not all(1 <= n < MOST for n in (*sizes, self.hop)) or not known:
            raise PolyKVError("the card's geometry, hop or dtype is invalid; seal it again")
        if not 0 <= self.position_offset < MOST:
            raise PolyKVError("position_offset of a card has to be a non-negative integer")
        if self.budget_bits is not None and not 0 < self.budget_bits < math.inf:
            raise PolyKVError("budget_bits of a card has to be a number of bits such as 4.0")
        if self.parent is not None and not _DIGEST.fullmatch(self.parent):
            raise PolyKVError("the parent of a card has to be a card's digest; seal it again")
        for name in LABELS:
            label = getattr(self, name)
            odd = not label.isprintable() or label.startswith(".") or {*label} & {*"/\\"}
            if odd or len(label) > LABEL:
                raise PolyKVError(
                    f"the card's {name} {label[:40]!a} is not a valid label; give up to {LABEL} printable "
                    "characters without / and \\, not starting with a dot"
                )

    @classmethod
    def parse(cls, given: dict[str, Any]) -> CardMetadata:
        """Parse the fields of a card's file.

        Raises:
            CardError: a field is missing, unknown, or of the wrong type or range.
        """
        types = {field.name: str(field.type) for field in fields(cls)}
        named = all(given[name] != value for name, value in OPTIONAL.items() if name in given)
        if set(given) | set(OPTIONAL) != set(types) or not named:
            raise CardError("the card's fields do not match its version; seal it again")
        for name, value in given.items():
            if type(value) not in cls._TYPES[types[name]]:
                raise CardError(
                    f"the card's field {name} is not of type {types[name]}; seal it again"
                )
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
        payload: Payload,
        budget_bits: float,
        position_offset: int,
        **labels: str,
    ) -> CardMetadata:
        """The metadata of a first card (hop 1); `labels` are sender, receiver and session."""
        g = Geometry.of(sending.model.config)
        n_kv_heads, head_dim = g.shape
        n_tokens = sending.n_tokens
        return cls(
            model=fingerprint.of_model(sending.model),
            tokenizer=fingerprint.of_tokenizer(tokenizer),
            n_layers=g.n_layers,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            dtype=DTYPE_NAMES[attending(sending.cache)[0].keys.dtype],
            exact=payload.exact,
            group_size=payload.group_size,
            n_tokens=n_tokens,
            policy=policy.name,
            budget_bits=float(budget_bits) if policy.has_budget else None,
            position_offset=position_offset,
            hop=1,
            parent=None,
            payload=payload.kind,
            windows=list(g.windows) if any(g.windows) else None,
            n_left=max(n_tokens - layer.kept(n_tokens) for layer in g.layers),
            states=list(g.stateful) or None,
            **labels,
        )

    def to_fields(self) -> dict[str, Any]:
        """The fields of a card's file."""
        return {k: v for k, v in asdict(self).items() if k not in OPTIONAL or v != OPTIONAL[k]}

    def check(self, expected: Mapping[str, Any]) -> None:
        """Compare metadata with what a receiver expects, by name of the field.

        Raises:
            CardError: names a field with another value.
            PolyKVError: the metadata have no such field.
        """
        known = [field.name for field in fields(self)]
        for name, value in expected.items():
            if name not in known:
                hint = config.did_you_mean(name, known)
                raise PolyKVError(f"a card's metadata have no field {name!r}{hint}")
            found = getattr(self, name)
            if found != value:
                raise CardError(
                    f"the card's {name} is {found!r}, and this receiver expects {value!r}; "
                    "have it sealed for this receiver"
                )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of all keys, and of all values, without windows and states: (1, layers * heads, tokens, head_dim)."""
        return (1, self.n_layers * self.n_kv_heads, self.n_tokens, self.head_dim)

    @property
    def n_values(self) -> int:
        """Number of cached values, keys and values together."""
        windows = self.windows or [None] * (self.n_layers - len(self.states or ()))
        n_kept = sum(kept_tokens(self.n_tokens, window) for window in windows)
        return 2 * n_kept * self.n_kv_heads * self.head_dim
