"""Hypothesis strategies: committed cards and results, edited as JSON or in the payload, with right digests."""

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st

from robustness import forge
from robustness.promises import committed

CARDS, CELL = committed("card"), committed("cell")["sealed"]
SIZES = st.one_of(st.integers(-3, 100), st.integers(-(1 << 70), 1 << 70), st.just(1 << 62))
JSON = st.recursive(
    st.none() | st.booleans() | SIZES | st.floats() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
STRANGE = JSON | st.sampled_from((
    10**30, 1e308, float("nan"), "../../x", "a\x00b", "a\nb", "\ud800", "\u202e", "\x1b[2J",
    "F16", "BF16", "F32", "U8", "I32", "I64", "float16", "float32", "bfloat16", [[]], [0], {"": 0},
))  # fmt: skip
WORDS = [struct.pack("<e", x) for x in (float("nan"), float("inf"), -1.0, 6e-8, 65504.0)]
WORDS += [struct.pack("<i", x) for x in (-1, -(1 << 31), (1 << 31) - 1, 299, 300)]


def holders(value: Any) -> list[Any]:
    """Every list and table inside `value` that is not empty, itself included."""
    found, left = [], [value]
    while left:
        value = left.pop()
        if isinstance(value, dict | list) and value:
            found.append(value)
            left.extend(value.values() if isinstance(value, dict) else value)
    return found


@st.composite
def json_edits(draw: st.DrawFn, value: Any) -> None:
    """One node of `value` replaced, removed, doubled, renamed or nudged, in place."""
    holder = draw(st.sampled_from(holders(value)))
    key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
    kind = draw(st.sampled_from(("replace", "remove", "double", "nudge")))
    if kind == "remove":
        del holder[key]
    elif kind == "double" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == "double":
        holder[draw(st.sampled_from((*holder, "x", "../x", "a\nb")))] = copy.deepcopy(holder[key])
    elif kind == "nudge" and type(number := holder[key]) is int:
        holder[key] = draw(st.sampled_from((number + 1, number - 1, -number, 2 * number)))
    else:
        holder[key] = draw(STRANGE)


@st.composite
def cards(draw: st.DrawFn) -> bytes:
    """A committed card after one to three edits of its fields, its header or its payload."""
    parts = forge.take_apart(CARDS[draw(st.sampled_from(sorted(CARDS)))])
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("fields", "header", "regroup", "payload")))
        if kind == "fields" and parts.fields:
            draw(json_edits(parts.fields))
        elif kind == "header" and parts.header:
            draw(json_edits(parts.header))
        elif kind == "regroup":  # other layers and heads, as many in all: every tensor still fits
            sizes = [k for k, v in parts.fields.items() if type(v) is int]
            more, fewer = (draw(st.sampled_from(sizes or ["hop"])) for _ in "mf")
            parts.fields[more] = 2 * (parts.fields.get(more) or 1)
            if type(parts.fields.get(fewer)) is int:
                parts.fields[fewer] //= 2
        elif kind == "payload":
            word = draw(st.sampled_from(WORDS))
            at = 2 * draw(st.integers(0, (len(parts.payload) - len(word)) // 2))
            parts.payload[at : at + len(word)] = word
    return forge.put_together(parts)


@st.composite
def cells(draw: st.DrawFn) -> bytes:
    """The committed cell after one or two edits; its digest is right again in most cases."""
    table = json.loads(CELL)
    for _ in range(draw(st.integers(1, 2))):
        if table:
            draw(json_edits(table))
    return json.dumps(table if draw(st.booleans()) else forge.sealed(table)).encode()
