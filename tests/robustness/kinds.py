"""Every kind of damage that has a name: `CARDS[name](content)` and `CELLS[name](content)` give a file to be refused.

Digests are right unless the name says otherwise, so that the check behind the digest is reached.
"""

import json
import re
import struct
from collections.abc import Callable
from typing import Any

from robustness import forge
from robustness.promises import KEY, MAX_TOKENS, VOCABULARY

Damage = Callable[[bytes], bytes]
FORMATS = {"I32": "<i", "F16": "<e", "F32": "<f"}
HOP, BUDGET = re.compile(r'\\"hop\\":\d+'), re.compile(r'(\\"budget_bits\\":)[^,]+')


def poke(parts: forge.Parts, tensor: str, value: float, index: int = 0) -> None:
    """Overwrite one number of a tensor."""
    entry = parts.header[tensor]
    word = struct.pack(FORMATS[entry["dtype"]], value)
    at = entry["data_offsets"][0] + index * len(word)
    parts.payload[at : at + len(word)] = word


def floats(parts: forge.Parts) -> list[str]:
    """The card's scales and exact values."""
    return [name for name, entry in parts.header.items() if entry.get("dtype") in ("F16", "F32")]


def forged(change: Callable[[forge.Parts], Any]) -> Damage:
    """A change to a card's parts."""

    def damage(content: bytes) -> bytes:
        parts = forge.take_apart(content)
        change(parts)
        return forge.put_together(parts)

    return damage


def entry(tensor: str, **values: Any) -> Damage:
    """A change to what the header says of a tensor."""
    return forged(lambda parts: parts.header[tensor].update(values))


def card_field(name: str, value: Any) -> Damage:
    """A field of the card with another value."""
    return forged(lambda parts: parts.fields.update({name: value}))


def text(change: Callable[[str], str]) -> Damage:
    """A change to the header as text."""
    return lambda c: forge.with_header(change(_header(c).decode().rstrip()), _payload(c))


def length(claimed: Callable[[int], int]) -> Damage:
    """Another length of the header than it has."""
    return lambda c: claimed(int.from_bytes(c[:8], "little")).to_bytes(8, "little") + c[8:]


def _header(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _payload(content: bytes) -> bytes:
    return content[8 + len(_header(content)) :]


def _framed(header: bytes, payload: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


def _signature_off_by_one_bit(content: bytes) -> bytes:
    signed = card_field("signature", "0" * 64)(content)
    return signed.replace(b'signature\\":\\"0', b'signature\\":\\"1')


CARDS: dict[str, Damage] = {
    "a shape of 2^40 ids": entry("token_ids", shape=[1 << 40]),
    "a shape and offsets of 2^46 bytes": entry("token_ids", shape=[1 << 40], data_offsets=[0, 1 << 42]),
    "a shape past 64 bits": entry("token_ids", shape=[1 << 70]),
    "a negative shape": entry("token_ids", shape=[-20]),
    "a shape of no list": entry("token_ids", shape={}),
    "offsets past the end": entry("key.map", data_offsets=[1 << 30, (1 << 30) + 5]),
    "negative offsets": entry("key.map", data_offsets=[-5, 0]),
    "overlapping offsets": forged(lambda p: p.header["key.map"].update(p.header["value.map"])),
    "a dtype that cards do not have": entry("token_ids", dtype="F64"),
    "another dtype of the same size": entry("token_ids", dtype="F32"),
    "a line break in a tensor's name": forged(lambda p: p.header.update({"x\ny": p.header["key.map"]})),
    "a tensor of another name": forged(lambda p: p.header.update({"key.32.codes": p.header.pop("key.map")})),
    "a tensor too many": forged(lambda p: _add_tensor(p)),
    "no tokens": card_field("n_tokens", 0),
    "a negative number of layers": card_field("n_layers", -2),
    "no heads": card_field("n_kv_heads", 0),
    "2^40 tokens": card_field("n_tokens", 1 << 40),
    "a hop below one": card_field("hop", 0),
    "a hop that is text": card_field("hop", "1"),
    "positions past the model's": card_field("position_offset", MAX_TOKENS),
    "a budget below zero": card_field("budget_bits", -4.0),
    "mean bits that are not the tensors'": card_field("mean_bits", 4.0),
    "other layers and heads, as many in all": forged(lambda p: p.fields.update(n_layers=4, n_kv_heads=1)),
    "a sender that is a path": card_field("sender", "../../etc/passwd"),
    "a sender with a NUL": card_field("sender", "agent\x00.png"),
    "a sender with a line break": card_field("sender", "agent\nrm -rf"),
    "a sender with an escape sequence": card_field("sender", "\x1b[2J"),
    "a sender with a lone surrogate": card_field("sender", "\ud800"),
    "a sender of 10,000 characters": card_field("sender", "a" * 10_000),
    "a policy that is a path": card_field("policy", "..\\windows"),
    "a parent that is no digest": card_field("parent", "../parent.card"),
    "a field too many": card_field("extra", 1),
    "a field too few": forged(lambda p: p.fields.pop("hop")),
    "version 3 of the format": card_field("version", 3),
    "version 1 of the format": card_field("version", 1),
    "version 0 of the format": card_field("version", 0),
    "a negative id": forged(lambda p: poke(p, "token_ids", -1)),
    "an id past the vocabulary": forged(lambda p: poke(p, "token_ids", VOCABULARY)),
    "a NaN among scales or values": forged(lambda p: poke(p, floats(p)[0], float("nan"))),
    "an infinity among scales or values": forged(lambda p: poke(p, floats(p)[-1], float("inf"))),
    "a field that stands twice": text(lambda t: HOP.sub(r"\g<0>,\g<0>", t)),
    "an entry that stands twice": text(lambda t: t[:-1] + ',"token_ids":{}}'),
    "a field that is no JSON number": text(lambda t: HOP.sub(r'\\"hop\\":NaN', t)),
    "a budget of 1e999": text(lambda t: BUDGET.sub(r"\g<1>1e999", t)),
    "deep JSON": text(lambda t: t[:-1] + ',"x":' + "[" * 5000 + "]" * 5000 + "}"),
    "deeper JSON than the reader's stack": lambda c: _framed(b"[" * (1 << 14), c[8:]),
    "a number of 5,000 digits": text(lambda t: t[:-1] + ',"x":' + "9" * 5000 + "}"),
    "a header of a megabyte": text(lambda t: t + " " * (1 << 20)),
    "a header that is not UTF-8": lambda c: forge.with_digest(c.replace(b'"token_ids"', b'"token_id\xff"', 1)),
    "a header in UTF-16": lambda c: _framed(_header(c).decode().encode("utf-16-le"), _payload(c)),
    "a header that is no JSON": lambda c: c[:8] + b"x" + c[9:],
    "a header that is a list": lambda c: _framed(b"[1, 2]  ", _payload(c)),
    "an empty header": lambda c: _framed(b"{}"),
    "a header alone": lambda c: _framed(_header(c)),
    "an empty file": lambda c: b"",
    "seven bytes": lambda c: c[:7],
    "a digest that does not match": lambda c: c[:-1] + bytes([c[-1] ^ 1]),
    "bytes after the end": lambda c: forge.with_digest(c + b"more"),
    "an end that is missing": lambda c: forge.with_digest(c[:-4]),
    "a header length that is too short": length(lambda n: n - 8),
    "a header length that is too long": length(lambda n: n + 8),
    "a header length of 2^63": length(lambda n: 1 << 63),
    "a header length of all ones": length(lambda n: (1 << 64) - 1),
    "a pickle that runs a command": lambda c: b"cos\nsystem\n(S'echo owned'\ntR.",
    "a signature that is one bit off": _signature_off_by_one_bit,
}  # fmt: skip


def _add_tensor(parts: forge.Parts) -> None:
    end = len(parts.payload)
    parts.header["else"] = {"dtype": "U8", "shape": [8], "data_offsets": [end, end + 8]}
    parts.payload += bytes(8)


def unsigned_kinds(content: bytes) -> dict[str, bytes]:
    """Cards that must be refused where KEY is required, and are valid otherwise."""
    parts = forge.take_apart(content)
    parts.fields.pop("signature", None)
    unsigned = forge.put_together(parts)
    parts.fields["signature"] = KEY.sign(b"another card")
    return {"no signature": unsigned, "another card's signature": forge.put_together(parts)}


def edited(change: Callable[[dict[str, Any]], Any], sealed: bool = True) -> Damage:
    """A change to a cell's table; not `sealed`: as by hand, with the old digest."""

    def damage(content: bytes) -> bytes:
        table = json.loads(content)
        change(table)
        return json.dumps(forge.sealed(table) if sealed else table, indent=1).encode()

    return damage


def by_hand(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return edited(change, sealed=False)


def value(column: str, value: Any) -> Damage:
    """Another value in a column of the first row."""
    return edited(lambda table: table["rows"][0].update({column: value}))


FIRST_VALUE = re.compile(rb'("value": )[^,]+')
CELLS: dict[str, Damage] = {
    "half of a file": lambda c: c[: len(c) // 2],
    "a value changed by hand": by_hand(lambda t: t["rows"][0].update(value=1.0)),
    "another cell's file": edited(lambda t: t.update(cell="other")),
    "an empty file": lambda c: b"",
    "a last byte that is missing": lambda c: c[:-1],
    "zeros, as after a power cut": lambda c: bytes(len(c)),
    "an interval widened by hand": by_hand(lambda t: t["rows"][0].update(ci_low=-9.0)),
    "a row deleted by hand": by_hand(lambda t: t["rows"].pop()),
    "a row copied by hand": by_hand(lambda t: t["rows"].append(t["rows"][0])),
    "settings changed by hand": by_hand(lambda t: t["config"].update(seed=1)),
    "a date changed by hand": by_hand(lambda t: t["provenance"].update(created_at="2020-01-01")),
    "another digest": by_hand(lambda t: t.update(digest="0" * 64)),
    "JSON that is no cell": lambda c: b'{"hello": "world"}',
    "one bit flipped": lambda c: c.replace(b'"value"', b'"valud"', 1),
    "a byte-order mark": lambda c: b"\xff\xfe" + c,
    "a value that is text": value("value", "2.5"),
    "a value that is a table": value("value", {"a": 1}),
    "a value that is a list": value("value", [1, 2]),
    "a value of NaN": value("value", float("nan")),
    "a value of 400 digits": value("value", 10**400),
    "a value of 1e999": lambda c: FIRST_VALUE.sub(rb"\g<1>1e999", c, count=1),
    "a negative number of agents": value("n_agents", -1),
    "a lone surrogate in a name": value("model", "\ud800"),
    "a name that is a number": value("model", 7),
    "a row without a value": edited(lambda t: t["rows"][0].pop("value")),
    "a row without a metric": edited(lambda t: t["rows"][0].pop("metric")),
    "rows that are no list": edited(lambda t: t.update(rows=3)),
    "rows that are a table": edited(lambda t: t.update(rows={"a": 1})),
    "another cell's name with a line break": edited(lambda t: t.update(cell="x\n\x1b[2J")),
    "a list around a cell": lambda c: b"[" + c + b"]",
    "deep JSON": lambda c: b"[" * 100_000 + b"]" * 100_000,
    "bytes that are not UTF-8": lambda c: c.replace(b'"rows"', b'"\xff\xfe"'),
    "ten megabytes of spaces": lambda c: c + b" " * (10 << 20),
}
