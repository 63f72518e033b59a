"""Structure-aware mutators: JSON edited as JSON, cards edited as cards, digests mended afterwards."""

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

from fuzz import forge

Mutate = Callable[[bytes, int], bytes]  # libFuzzer's own: bytes and the most bytes of the result

STRANGE: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 255, 1 << 15, 1 << 31, 1 << 48, 1 << 63, 1 << 64, 10**30, 0.0, -0.0, 0.5, 1e308,
    float("inf"), float("nan"), None, True, False, "", "0", "None", "../../x", "a/b", "a\x00b", "a\nb",
    "\ud800", "\u202e", "\x1b[2J", "é" * 200, [], {}, [[]], [0], [1, 1], {"": 0}, "F16", "BF16", "F32",
    "U8", "I32", "I64", "float16", "float32", "bfloat16",
)  # fmt: skip
FLOATS = tuple(struct.pack("<e", x) for x in (float("nan"), float("inf"), -1.0, 6e-8, 65504.0))
INTS = tuple(struct.pack("<i", x) for x in (-1, -(1 << 31), (1 << 31) - 1, 299, 300))
DEEP = "[" * 3000 + "]" * 3000


def mutate_json(value: Any, rng: random.Random) -> Any:
    """`value` with one node replaced, nudged, removed, renamed or doubled. Edits in place."""
    holders = [holder for holder in _holders(value) if holder]
    if not holders or rng.random() < 0.02:
        return _strange(rng)
    holder = rng.choice(holders)
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    kind = rng.randrange(5)
    if kind == 0:
        holder[key] = _strange(rng)
    elif kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice((*holder, "x", "../x", "a\nb"))] = holder.pop(key)
    elif kind == 3 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[key] = _nudged(holder[key], rng)
    return value


def json_text(value: Any, rng: random.Random) -> str:
    """JSON as others may write it: doubled keys, deep nesting, odd spacing."""
    text = json.dumps(value, separators=(",", ":"))
    if text.startswith("{") and len(text) > 2 and rng.random() < 0.1:
        key = rng.choice(list(value))
        extra = rng.choice((json.dumps(_strange(rng)), DEEP))
        text = f"{{{json.dumps(key)}:{extra},{text[1:]}"
    return text


def mutate_card(content: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """A changed card of at most `size` bytes; in nine of ten cases its digest is right again."""
    rng = random.Random(seed)
    parts = forge.take_apart(content)
    if parts is None or rng.random() < 0.2:
        out = mutate(content, size)
    else:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            rng.choice(EDITS)(parts, rng)
        metadata = parts.header.get("__metadata__")
        if isinstance(metadata, dict):
            metadata[forge.KEY] = json_text(parts.fields, rng)
        out = forge.with_header(json_text(parts.header, rng), parts.payload)
    return (forge.with_digest(out) if rng.random() < 0.9 else out)[:size]


def mutate_cell(content: bytes, size: int, seed: int, mutate: Mutate) -> bytes:
    """A changed cell file of at most `size` bytes."""
    rng = random.Random(seed)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return mutate(content, size)
    if rng.random() < 0.2:
        return mutate(content, size)
    for _ in range(rng.choice((1, 1, 2))):
        value = mutate_json(value, rng)
    if isinstance(value, dict) and "digest" in value and rng.random() < 0.8:
        value["digest"] = forge.digest_of_cell(value)
    return json_text(value, rng).encode("utf-8", "surrogatepass")[:size]


def _edit_fields(parts: forge.Parts, rng: random.Random) -> None:
    found = mutate_json(parts.fields, rng)
    parts.fields = found if isinstance(found, dict) else parts.fields


def _edit_table(parts: forge.Parts, rng: random.Random) -> None:
    found = mutate_json(parts.header, rng)
    parts.header = found if isinstance(found, dict) else parts.header


def _regroup(parts: forge.Parts, rng: random.Random) -> None:
    """Other layers and heads, as many in all: every tensor still fits."""
    names = ("n_layers", "n_kv_heads", "head_dim", "n_tokens", "group_size")
    more, fewer = rng.sample(names, 2)
    if all(type(parts.fields.get(name)) is int for name in (more, fewer)):
        parts.fields[more] *= 2
        parts.fields[fewer] //= 2


def _retype(parts: forge.Parts, rng: random.Random) -> None:
    """A tensor of another dtype over the same bytes."""
    entry = parts.header.get(rng.choice(list(parts.header) or [""]))
    if not isinstance(entry, dict) or not isinstance(entry.get("data_offsets"), list):
        return
    dtype, size = rng.choice((("U8", 1), ("F16", 2), ("BF16", 2), ("F32", 4), ("I32", 4)))
    if [type(offset) for offset in entry["data_offsets"]] == [int, int]:
        begin, end = entry["data_offsets"]
        entry |= {"dtype": dtype, "shape": rng.choice(([(end - begin) // size], {}, [], ""))}


def _poke(parts: forge.Parts, rng: random.Random) -> None:
    """A number of the payload that no encoder writes."""
    word = rng.choice((*FLOATS, *INTS))
    if len(parts.payload) >= len(word):
        at = rng.randrange(len(parts.payload) - len(word) + 1) & -2
        parts.payload[at : at + len(word)] = word


EDITS = (_edit_fields, _edit_fields, _edit_table, _regroup, _retype, _poke)


def _holders(value: Any) -> list[Any]:
    """Every list and table inside `value`, itself included."""
    found, left = [], [value]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            found.append(value)
            left.extend(value.values() if isinstance(value, dict) else value)
    return found


def _nudged(value: Any, rng: random.Random) -> Any:
    if type(value) is int:
        return rng.choice((value + 1, value - 1, -value, value * 2, value // 2, value << 32))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(("", "\n", "/", "0", "\\", '"', "\ud800")) + value[at + 1 :]
    return _strange(rng)


def _strange(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(STRANGE))
