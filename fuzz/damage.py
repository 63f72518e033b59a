"""Every kind of hostile file that has a name, each with a digest that is right unless it says otherwise.

`CARDS[name](content)` makes one from a seed card, which it does not change.
"""

import json
import re
import struct
from collections.abc import Callable
from typing import Any

from fuzz import forge
from fuzz.tiny import KEY, MAX_TOKENS, VOCABULARY

Damage = Callable[[bytes], bytes]
CARDS: dict[str, Damage] = {}
CELLS: dict[str, Damage] = {}  # likewise, of a cell's file of results


def _raw(name: str) -> Callable[[Damage], Damage]:
    def register(damage: Damage) -> Damage:
        CARDS[name] = damage
        return damage

    return register


def _forged(name: str, change: Callable[[forge.Parts], Any]) -> None:
    def damage(content: bytes) -> bytes:
        parts = forge.take_apart(content)
        change(parts)
        return forge.put_together(parts)

    CARDS[name] = damage


def _field(name: str, field: str, value: Any) -> None:
    _forged(name, lambda parts: parts.fields.update({field: value}))


def _entry(name: str, tensor: str, **values: Any) -> None:
    _forged(name, lambda parts: parts.header[tensor].update(values))


HOP, BUDGET = re.compile(r'\\"hop\\":\d+'), re.compile(r'(\\"budget_bits\\":)[^,]+')
FORMATS = {"I32": "<i", "F16": "<e", "F32": "<f"}


def poke(parts: forge.Parts, tensor: str, value: float, index: int = 0) -> None:
    """Overwrite one number of a tensor."""
    entry = parts.header[tensor]
    word = struct.pack(FORMATS[entry["dtype"]], value)
    at = entry["data_offsets"][0] + index * len(word)
    parts.payload[at : at + len(word)] = word


def floats(parts: forge.Parts) -> list[str]:
    """The card's scales and exact values."""
    return [name for name, entry in parts.header.items() if entry.get("dtype") in ("F16", "F32")]


def _text(name: str, change: Callable[[str], str]) -> None:
    """The header changed as text."""

    def damage(content: bytes) -> bytes:
        n_header = int.from_bytes(content[:8], "little")
        text = content[8 : 8 + n_header].decode().rstrip()
        return forge.with_header(change(text), content[8 + n_header :])

    CARDS[name] = damage


_entry("a shape of 2^40 ids", "token_ids", shape=[1 << 40])
_entry("a shape and offsets of 2^46 bytes", "token_ids", shape=[1 << 40], data_offsets=[0, 1 << 42])
_entry("a shape past 64 bits", "token_ids", shape=[1 << 70])
_entry("a negative shape", "token_ids", shape=[-20])
_entry("a shape of no list", "token_ids", shape={})
_entry("offsets past the end", "key.map", data_offsets=[1 << 30, (1 << 30) + 5])
_entry("negative offsets", "key.map", data_offsets=[-5, 0])
_forged("overlapping offsets", lambda p: p.header["key.map"].update(p.header["value.map"]))
_entry("a dtype that is none of ours", "token_ids", dtype="F64")
_entry("another dtype of the same size", "token_ids", dtype="F32")
_forged(
    "a tensor's name with a line break", lambda p: p.header.update({"x\ny": p.header["key.map"]})
)
_forged("a tensor too many", lambda p: p.header.update({"key.32.codes": p.header.pop("key.map")}))
_field("no tokens", "n_tokens", 0)
_field("a negative number of layers", "n_layers", -2)
_field("2^40 tokens", "n_tokens", 1 << 40)
_field("a hop below one", "hop", 0)
_field("positions past the model's", "position_offset", MAX_TOKENS)
_field("a budget below zero", "budget_bits", -4.0)
_field("mean bits that are not the tensors'", "mean_bits", 4.0)
_forged(
    "other layers and heads, as many in all", lambda p: p.fields.update(n_layers=4, n_kv_heads=1)
)
_field("a sender that is a path", "sender", "../../etc/passwd")
_field("a sender with a NUL", "sender", "agent\x00.png")
_field("a sender with a line break", "sender", "agent\nrm -rf")
_field("a sender with an escape sequence", "sender", "\x1b[2J")
_field("a sender of half a character", "sender", "\ud800")
_field("a sender of 10,000 characters", "sender", "a" * 10_000)
_field("a policy that is a path", "policy", "..\\windows")
_field("a parent that is no digest", "parent", "../parent.card")
_field("a field too many", "extra", 1)
_forged("a field too few", lambda p: p.fields.pop("hop"))
_field("version 3 of the format", "version", 3)
_field("version 1 of the format", "version", 1)
_field("version 0 of the format", "version", 0)
_forged("a negative id", lambda p: poke(p, "token_ids", -1))
_forged("an id past the vocabulary", lambda p: poke(p, "token_ids", VOCABULARY))
_forged("a NaN among scales or values", lambda p: poke(p, floats(p)[0], float("nan")))
_forged("an infinity among scales or values", lambda p: poke(p, floats(p)[-1], float("inf")))
_text("a field that stands twice", lambda text: HOP.sub(r"\g<0>,\g<0>", text))
_text("an entry that stands twice", lambda text: text[:-1] + ',"token_ids":{}}')
_text("a field that is no JSON number", lambda text: HOP.sub(r'\\"hop\\":NaN', text))
_text("a budget of 1e999", lambda text: BUDGET.sub(r"\g<1>1e999", text))
_text("deep JSON", lambda text: text[:-1] + ',"x":' + "[" * 5000 + "]" * 5000 + "}")
_text("a number of 5,000 digits", lambda text: text[:-1] + ',"x":' + "9" * 5000 + "}")
_text("a header of a megabyte", lambda text: text + " " * (1 << 20))


@_raw("a header that is not UTF-8")
def _(content: bytes) -> bytes:
    return forge.with_digest(content.replace(b'"token_ids"', b'"token_id\xff"', 1))


@_raw("a header in UTF-16")
def _(content: bytes) -> bytes:
    n_header = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + n_header].decode().encode("utf-16-le")
    return len(text).to_bytes(8, "little") + text + content[8 + n_header :]


@_raw("a digest that does not match")
def _(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@_raw("bytes after the end")
def _(content: bytes) -> bytes:
    return forge.with_digest(content + b"more")


@_raw("an end that is missing")
def _(content: bytes) -> bytes:
    return forge.with_digest(content[:-4])


@_raw("a header length that is too short")
def _(content: bytes) -> bytes:
    return (int.from_bytes(content[:8], "little") - 8).to_bytes(8, "little") + content[8:]


@_raw("a header length that is too long")
def _(content: bytes) -> bytes:
    return (int.from_bytes(content[:8], "little") + 8).to_bytes(8, "little") + content[8:]


@_raw("a header length of 2^63")
def _(content: bytes) -> bytes:
    return (1 << 63).to_bytes(8, "little") + content[8:]


@_raw("a pickle that runs a command")
def _(content: bytes) -> bytes:
    return b"cos\nsystem\n(S'echo owned'\ntR."


@_raw("a signature that is one bit off")
def _(content: bytes) -> bytes:
    parts = forge.take_apart(content)
    parts.fields["signature"] = "0" * 64
    signed = forge.put_together(parts)
    return signed.replace(b'signature\\":\\"0', b'signature\\":\\"1')


def unsigned_kinds(content: bytes) -> dict[str, bytes]:
    """Cards that must be refused where KEY is required, though all is well with them otherwise."""
    parts = forge.take_apart(content)
    parts.fields.pop("signature", None)
    unsigned = forge.put_together(parts)
    parts.fields["signature"] = KEY.sign(b"another card")
    return {"no signature": unsigned, "another card's signature": forge.put_together(parts)}


def _cell(name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    def damage(content: bytes) -> bytes:
        table = json.loads(content)
        change(table)
        if "digest" in table:
            table["digest"] = forge.digest_of_cell(table)
        return json.dumps(table).encode()

    CELLS[name] = damage


def _value(name: str, column: str, value: Any) -> None:
    _cell(name, lambda table: table["rows"][0].update({column: value}))


_value("a value that is text", "value", "2.5")
_value("a value that is a table", "value", {"a": 1})
_value("a value of NaN", "value", float("nan"))
_value("a value of 400 digits", "value", 10**400)
_value("a negative number of agents", "n_agents", -1)
_value("half a character in a name", "model", "\ud800")
_value("a name that is a number", "model", 7)
_cell("a row without a value", lambda table: table["rows"][0].pop("value"))
_cell("rows that are no list", lambda table: table.update(rows=3))
_cell("another cell's name with a line break", lambda table: table.update(cell="x\n\x1b[2J"))
CELLS["a value of 1e999"] = lambda content: content.replace(b'"value": 2.5', b'"value": 1e999')
CELLS["the first half of a file"] = lambda content: content[: len(content) // 2]
CELLS["no file at all: a list"] = lambda content: b"[" + content + b"]"
CELLS["deep JSON"] = lambda content: b"[" * 100_000 + b"]" * 100_000
CELLS["what is not UTF-8"] = lambda content: content.replace(b"reference", b"\xff\xfe")
CELLS["ten megabytes of spaces"] = lambda content: content + b" " * (10 << 20)
