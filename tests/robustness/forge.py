"""Damaged cards, cells and packed results: every kind of damage that has a name, and hypothesis strategies.

Digests are right unless the name says otherwise, so that the check behind the digest is reached; a fuzzer that only
flips bytes never gets there. This is the formats written a second time, apart from the reader's own code, so that a
mistake in the reader is not made here too.
"""

import copy
import gzip
import hashlib
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from polykv.cellfile import Cell, compose
from polykv.results import Rows
from robustness.promises import KEY, MAX_TOKENS, SEEDS, VOCABULARY

FIELD = "polykv_card"  # the one entry of the safetensors metadata
ZEROS = b"0" * 64
_DIGEST, _SIGNATURE = (
    re.compile(rb'(\\"' + name + rb'\\":\\")([0-9a-f]{64})') for name in (b"digest", b"signature")
)
Damage = Callable[[bytes], bytes]


# Cards


@dataclass
class Parts:
    """A card taken apart; `fields` are the card's own, inside the safetensors header."""

    header: dict[str, Any]
    fields: dict[str, Any]
    payload: bytearray

    def poke(self, tensor: str, value: float) -> None:
        """Overwrite the first number of a tensor."""
        entry = self.header[tensor]
        word = struct.pack({"I32": "<i", "F16": "<e", "F32": "<f"}[entry["dtype"]], value)
        start = entry["data_offsets"][0]
        self.payload[start : start + len(word)] = word

    def floats(self) -> list[str]:
        """The names of scales and exact values."""
        return [name for name, e in self.header.items() if e.get("dtype") in ("F16", "F32")]


def take_apart(content: bytes) -> Parts:
    """The parts of a valid card."""
    n_header = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n_header])
    fields = json.loads(header["__metadata__"][FIELD])
    return Parts(header, fields, bytearray(content[8 + n_header :]))


def put_together(parts: Parts) -> bytes:
    """The file of these parts, with a right digest wherever it has a place for one."""
    inner = json.dumps(parts.fields, sort_keys=True, separators=(",", ":"))
    header = dict(parts.header)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"] = header["__metadata__"] | {FIELD: inner}
    return with_header(json.dumps(header, separators=(",", ":")), parts.payload)


def with_header(text: str, payload: bytes) -> bytes:
    """A file of a header's text, padded as safetensors does, and a right digest."""
    head = text.encode("utf-8", "surrogatepass")
    return with_digest(_framed(head + b" " * (-len(head) % 8), bytes(payload)))


def with_digest(content: bytes) -> bytes:
    """`content` with a right digest, if its header has exactly one place for it."""
    n_head = min(8 + int.from_bytes(content[:8], "little"), len(content))
    head, payload = content[:n_head], content[n_head:]
    places, signatures = list(_DIGEST.finditer(head)), list(_SIGNATURE.finditer(head))
    if len(places) != 1 or len(signatures) > 1:
        return content
    blank = _SIGNATURE.sub(rb"\g<1>" + ZEROS, _DIGEST.sub(rb"\g<1>" + ZEROS, head))
    digest = hashlib.sha256(blank + payload)
    if signatures:
        digest = hashlib.sha256(digest.digest() + signatures[0][2])
    start = places[0].start(2)
    return head[:start] + digest.hexdigest().encode() + head[start + 64 :] + payload


def forged(change: Callable[[Parts], Any]) -> Damage:
    """A change to a card's parts."""

    def damage(content: bytes) -> bytes:
        parts = take_apart(content)
        change(parts)
        return put_together(parts)

    return damage


def entry(tensor: str, **values: Any) -> Damage:
    """A change to what the header says of a tensor."""
    return forged(lambda parts: parts.header[tensor].update(values))


def card_field(name: str, value: Any) -> Damage:
    """A field of the card with another value."""
    return forged(lambda parts: parts.fields.update({name: value}))


def text(change: Callable[[str], str]) -> Damage:
    """A change to the header as text."""
    return lambda c: with_header(change(_header(c).decode().rstrip()), _payload(c))


def length(claimed: Callable[[int], int]) -> Damage:
    """Another length of the header than it has."""
    return lambda c: claimed(int.from_bytes(c[:8], "little")).to_bytes(8, "little") + c[8:]


def unsigned(content: bytes) -> list[bytes]:
    """Without a signature, and with another card's: to be refused where KEY is required, and valid otherwise."""
    parts = take_apart(content)
    parts.fields.pop("signature", None)
    bare = put_together(parts)
    parts.fields["signature"] = KEY.sign(b"another card")
    return [bare, put_together(parts)]


def _header(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _payload(content: bytes) -> bytes:
    return content[8 + len(_header(content)) :]


def _framed(header: bytes, payload: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


def _add_tensor(parts: Parts) -> None:
    end = len(parts.payload)
    parts.header["else"] = {"dtype": "U8", "shape": [8], "data_offsets": [end, end + 8]}
    parts.payload += bytes(8)


HOP, BUDGET = re.compile(r'\\"hop\\":\d+'), re.compile(r'(\\"budget_bits\\":)[^,]+')
CARDS: dict[str, Damage] = {
    "a shape of 2^40 ids": entry("token_ids", shape=[1 << 40]),
    "a shape and offsets of 2^46 bytes": entry("token_ids", shape=[1 << 40], data_offsets=[0, 1 << 42]),
    "a negative shape": entry("token_ids", shape=[-20]),
    "offsets past the end": entry("key.map", data_offsets=[1 << 30, (1 << 30) + 5]),
    "overlapping offsets": forged(lambda p: p.header["key.map"].update(p.header["value.map"])),
    "a dtype that cards do not have": entry("token_ids", dtype="F64"),
    "a tensor of another name": forged(lambda p: p.header.update({"key.32.codes": p.header.pop("key.map")})),
    "a tensor too many": forged(_add_tensor),
    "2^40 tokens": card_field("n_tokens", 1 << 40),
    "a hop below one": card_field("hop", 0),
    "a budget below zero": card_field("budget_bits", -4.0),
    "a policy that is a path": card_field("policy", "..\\windows"),
    "positions past the model's": card_field("position_offset", MAX_TOKENS),
    "mean bits that are not the tensors'": card_field("mean_bits", 4.0),
    "other layers and heads, as many in all": forged(lambda p: p.fields.update(n_layers=4, n_kv_heads=1)),
    "a sender that is a path": card_field("sender", "../../etc/passwd"),
    "a sender of 10,000 characters": card_field("sender", "a" * 10_000),
    "a field too many": card_field("extra", 1),
    "a field too few": forged(lambda p: p.fields.pop("hop")),
    "a receiver that is empty": card_field("receiver", ""),
    "a session that is a number": card_field("session", 7),
    "a session with a line break": card_field("session", "a\nb"),
    "version 4 of the format": card_field("version", 4),
    "a negative id": forged(lambda p: p.poke("token_ids", -1)),
    "an id past the vocabulary": forged(lambda p: p.poke("token_ids", VOCABULARY)),
    "a NaN among scales or values": forged(lambda p: p.poke(p.floats()[0], float("nan"))),
    "an infinity among scales or values": forged(lambda p: p.poke(p.floats()[-1], float("inf"))),
    "a field that stands twice": text(lambda t: HOP.sub(r"\g<0>,\g<0>", t)),
    "an entry that stands twice": text(lambda t: t[:-1] + ',"token_ids":{}}'),
    "a budget of 1e999": text(lambda t: BUDGET.sub(r"\g<1>1e999", t)),
    "deep JSON": text(lambda t: t[:-1] + ',"x":' + "[" * 5000 + "]" * 5000 + "}"),
    "deeper JSON than the reader's stack": lambda c: _framed(b"[" * (1 << 14), c[8:]),
    "a number of 5,000 digits": text(lambda t: t[:-1] + ',"x":' + "9" * 5000 + "}"),
    "a header of a megabyte": text(lambda t: t + " " * (1 << 20)),
    "a header that is not UTF-8": lambda c: with_digest(c.replace(b'"token_ids"', b'"token_id\xff"', 1)),
    "a header that is a list": lambda c: _framed(b"[1, 2]  ", _payload(c)),
    "a header alone": lambda c: _framed(_header(c)),
    "an empty file": lambda c: b"",
    "a digest that does not match": lambda c: c[:-1] + bytes([c[-1] ^ 1]),
    "bytes after the end": lambda c: with_digest(c + b"more"),
    "an end that is missing": lambda c: with_digest(c[:-4]),
    "a header length that is too long": length(lambda n: n + 8),
    "a header length of all ones": length(lambda n: (1 << 64) - 1),
    "a pickle that runs a command": lambda c: b"cos\nsystem\n(S'echo owned'\ntR.",
    "a signature that is one bit off":
        lambda c: card_field("signature", "0" * 64)(c).replace(b'signature\\":\\"0', b'signature\\":\\"1'),
}  # fmt: skip


# Cells and packed results


def _cell() -> str:
    """The file of a cell with two samples and a value that is missing."""
    rows = Rows({"layer": int}, model="reference", recipe="polykv", budget_bits=4.0)
    for sample, value in enumerate((2.5, 3.5)):
        rows.add("perplexity", value, "ppl", sample=sample, layer=1, n=10, n_agents=3, bos=True)
    rows.add("kv_memory", None, "GB", why="no GPU")
    study = {"name": "compare", "title": "t", "question": "q?", "answers": [], "settings": ["seed"]}
    study |= {"columns": {"layer": "int"}}
    origin = {"commit": "0" * 12, "created_at": "2026-11-28T12:00:00+00:00", "versions": {}}
    config = {"model": {"name": "reference"}, "context": 512, "seed": 0}
    return compose(Cell(study, "abc", config, origin, rows.by_column(), [{"question": "a"}]))


CELL = _cell().encode()


def sealed(table: dict[str, Any]) -> dict[str, Any]:
    """A file's table with a right digest."""
    kept = {key: value for key, value in table.items() if key != "digest"}
    return kept | {"digest": hashlib.sha256(json.dumps(kept).encode()).hexdigest()}


def edited(change: Callable[[dict[str, Any]], Any], seal: Callable[[Any], Any] = sealed) -> Damage:
    """A change to a cell's table."""

    def damage(content: bytes) -> bytes:
        table = json.loads(content)
        change(table)
        return json.dumps(seal(table), indent=1).encode()

    return damage


def by_hand(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """As with an editor, which leaves the old digest."""
    return edited(change, lambda table: table)


def whole(**values: Any) -> Damage:
    """Other parts of a cell's table."""
    return edited(lambda table: table.update(values))


def part(name: str, /, **values: Any) -> Damage:
    """Other values in a part."""
    return edited(lambda table: table[name].update(values))


def column(name: str, value: Any) -> Damage:
    """Another value in a column of the first row."""
    return edited(lambda t: t["rows"].update({name: [value, *t["rows"]["metric"][1:]]}))


FIRST_VALUE = re.compile(rb'("value": \[)[^,\]]+')
CELLS: dict[str, Damage] = {
    "half of a file": lambda c: c[: len(c) // 2],
    "an empty file": lambda c: b"",
    "a last byte that is missing": lambda c: c[:-1],
    "one bit flipped": lambda c: c.replace(b'"value"', b'"valud"', 1),
    "a value changed by hand": by_hand(lambda t: t["rows"].update(value=1.0)),
    "settings changed by hand": by_hand(lambda t: t["config"].update(seed=1)),
    "a digest that is missing": by_hand(lambda t: t.pop("digest")),
    "another cell's file": whole(cell="other"),
    "another study's file": part("study", name="other"),
    "the format before typed rows": whole(format=1, rows=[{"protocol": "text", "value": 1.0, "ci_low": 0.9}]),
    "a later format": whole(format=3),
    "JSON that is no cell": lambda c: b'{"hello": "world"}',
    "a list around a cell": lambda c: b"[" + c + b"]",
    "deep JSON": lambda c: b"[" * 100_000 + b"]" * 100_000,
    "a byte-order mark": lambda c: b"\xff\xfe" + c,
    "bytes that are not UTF-8": lambda c: c.replace(b'"rows"', b'"\xff\xfe"'),
    "forty megabytes of spaces": lambda c: c + b" " * (40 << 20),
    "another cell's name with a line break": whole(cell="x\n\x1b[2J"),
    "a study without a question": edited(lambda t: t["study"].pop("question")),
    "a study with a column of no type": part("study", columns={"layer": "complex"}),
    "a study that gives value another type": part("study", columns={"value": "str"}),
    "a column's name with an escape sequence": part("study", columns={"\x1b[2J": "int"}),
    "a column that nobody declared": part("rows", colour="red"),
    "a column that is told once": part("rows", commit="0" * 12),
    "a column that is too short": part("rows", value=[1.0]),
    "a value that is text": part("rows", value="2.5"),
    "a value that is a table": part("rows", value={"a": 1}),
    "a value of NaN": part("rows", value=float("nan")),
    "a value of 400 digits": part("rows", value=10**400),
    "a value of 1e999": lambda c: FIRST_VALUE.sub(rb"\g<1>1e999", c, count=1),
    "a negative number of agents": part("rows", n_agents=-1),
    "a truth that is a number": part("rows", bos=1),
    "a lone surrogate in a name": part("rows", model="\ud800"),
    "a lone surrogate in a question": part("study", question="\ud800"),
    "a row without a metric": column("metric", None),
    "rows without metrics": edited(lambda t: t["rows"].pop("metric")),
    "metrics that are one text": part("rows", metric="kl"),
    "rows that are a list": whole(rows=[{"metric": "kl", "value": 1.0}]),
    "a provenance without a date": edited(lambda t: t["provenance"].pop("created_at")),
    "answers that are text": whole(answers="yes"),
}  # fmt: skip

ROWS, TABLE = "rows.csv.gz", "cells.json.gz"
# What is changed in packed results: a file's bytes, or the rows as CSV and the table, with right digests but by hand.
FILES: dict[str, tuple[str, Damage]] = {
    "rows cut off": (ROWS, lambda c: c[: len(c) // 2]),
    "a table cut off": (TABLE, lambda c: c[: len(c) // 2]),
    "a byte changed inside": (ROWS, lambda c: c[:40] + bytes([c[40] ^ 255]) + c[41:]),
    "bytes after the end": (ROWS, lambda c: c + b"more"),
    "an LFS pointer": (TABLE, lambda c: b"version https://git-lfs.github.com/spec/v1"),
    "a table that is a list": (TABLE, lambda c: gzip.compress(b"[]")),
    "deep JSON": (TABLE, lambda c: gzip.compress(b"[" * 100_000)),
}
PACKED: dict[str, Callable[[str, dict[str, Any]], str | None]] = {
    "a value changed by hand": lambda rows, t: rows.replace("2.5", "1.5", 1),
    "a row deleted by hand": lambda rows, t: rows[: rows.rindex("\r\n", 0, -2) + 2],
    "settings changed by hand": lambda rows, t: t["cells"][0]["config"].update(seed=1),
    "a later format": lambda rows, t: t.update(format=3),
    "a value of NaN": lambda rows, t: rows.replace("2.5", "nan", 1),
    "a column that is missing": lambda rows, t: rows.replace("value", "valud", 1),
    "rows of a cell that is not listed": lambda rows, t: t["cells"].clear(),
    "a cell that is listed twice": lambda rows, t: t["cells"].append(t["cells"][0]),
    "a study with a column of no type": lambda rows, t: t["cells"][0]["study"].update(columns={"layer": "complex"}),
}  # fmt: skip


def damage_packed(root: Path, kind: str) -> None:
    """Do one of FILES or PACKED to the packed results of a folder."""
    if kind in FILES:
        name, change = FILES[kind]
        (root / name).write_bytes(change((root / name).read_bytes()))
        return
    rows, table = (gzip.decompress((root / name).read_bytes()).decode() for name in (ROWS, TABLE))
    table = json.loads(table)
    rows = PACKED[kind](rows, table) or rows
    if "by hand" not in kind:
        table = sealed(table | {"rows": hashlib.sha256(rows.encode()).hexdigest()})
    for name, text in ((ROWS, rows), (TABLE, json.dumps(table))):
        (root / name).write_bytes(gzip.compress(text.encode()))


# Strategies

SIZES = st.one_of(st.integers(-3, 100), st.integers(-(1 << 70), 1 << 70), st.just(1 << 62))
JSON = st.recursive(
    st.none() | st.booleans() | SIZES | st.floats() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
STRANGE = JSON | st.sampled_from((
    10**30, 1e308, float("nan"), "../../x", "a\x00b", "a\nb", "\ud800", "\u202e", "\x1b[2J", "int", "str",
    "F16", "BF16", "F32", "U8", "I32", "I64", "float16", "float32", "bfloat16", [[]], [0], {"": 0},
))  # fmt: skip
WORDS = [struct.pack("<e", x) for x in (float("nan"), float("inf"), -1.0, 6e-8, 65504.0)]
WORDS += [struct.pack("<i", x) for x in (-1, -(1 << 31), (1 << 31) - 1, 299, 300)]


def holders(value: Any) -> list[Any]:
    """Every list and table inside `value` that is not empty, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(found for item in inner for found in holders(item))] if inner else []


@st.composite
def json_edits(draw: st.DrawFn, value: Any) -> None:
    """One node of `value` replaced, removed, doubled or renamed, in place."""
    holder = draw(st.sampled_from(holders(value)))
    key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
    kind = draw(st.sampled_from(("replace", "remove", "double")))
    if kind == "replace":
        holder[key] = draw(STRANGE)
    elif kind == "remove":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[draw(st.sampled_from((*holder, "x", "../x", "a\nb")))] = copy.deepcopy(holder[key])


@st.composite
def cards(draw: st.DrawFn, seeds: Mapping[str, bytes] = SEEDS) -> bytes:
    """A card, by default a committed one, after one to three edits of its fields, its header or its payload."""
    parts = take_apart(seeds[draw(st.sampled_from(sorted(seeds)))])
    for _ in range(draw(st.integers(1, 3))):
        edited = draw(st.sampled_from((parts.fields, parts.header, parts.payload)))
        if edited is not parts.payload:
            draw(json_edits(edited)) if edited else None
            continue
        word = draw(st.sampled_from(WORDS))
        at = 2 * draw(st.integers(0, (len(edited) - len(word)) // 2))
        edited[at : at + len(word)] = word
    return put_together(parts)


@st.composite
def splices(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a piece overwritten, removed, repeated, moved or inserted, or its end cut off or extended.

    Half of the damage is in a card's header, which is the part that is parsed.
    """
    n_header = 8 + int.from_bytes(content[:8], "little")
    n = draw(st.sampled_from((1, 1, 2, 8, 64, len(content))))
    at = draw(st.integers(0, n_header) | st.integers(0, len(content)))
    start = draw(st.integers(0, len(content)))
    piece = draw(st.binary(max_size=min(n, 64)) | st.just(content[start : start + n]))
    return content[:at] + piece + content[at + draw(st.sampled_from((0, n, len(piece)))) :]


@st.composite
def cells(draw: st.DrawFn) -> bytes:
    """CELL after one or two edits; its digest is right again in most cases."""
    table = json.loads(CELL)
    for _ in range(draw(st.integers(1, 2))):
        if table:
            draw(json_edits(table))
    return json.dumps(sealed(table) if draw(st.booleans()) else table).encode()
