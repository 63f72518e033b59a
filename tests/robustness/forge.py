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
from collections.abc import Callable
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
    "version 3 of the format": card_field("version", 3),
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
    """The table of a cell's or an archive's file with a right digest, where it had one."""
    kept = {key: value for key, value in table.items() if key != "digest"}
    if kept == table:
        return table
    return kept | {"digest": hashlib.sha256(json.dumps(kept).encode()).hexdigest()}


def edited(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """A change to a cell's table."""
    return by_hand(change, seal=sealed)


def by_hand(
    change: Callable[[dict[str, Any]], Any], seal: Callable[[Any], Any] = lambda table: table
) -> Damage:
    """As with an editor, which leaves the old digest."""

    def damage(content: bytes) -> bytes:
        table = json.loads(content)
        change(table)
        return json.dumps(seal(table), indent=1).encode()

    return damage


def value(column: str, value: Any, way: Callable[..., Damage] = edited) -> Damage:
    """Another value in a column of the first row."""

    def change(table: dict[str, Any]) -> None:
        rows, n_rows = table["rows"], len(table["rows"]["metric"])
        values = rows.get(column)
        rows[column] = [value, *(values if isinstance(values, list) else [values] * n_rows)[1:]]

    return way(change)


def part(of: str, **values: Any) -> Damage:
    """Other values in a part of the table: study, config, provenance or rows."""
    return edited(lambda table: table[of].update(values))


def whole(**values: Any) -> Damage:
    """Other parts."""
    return edited(lambda table: table.update(values))


def _copy_a_row(table: dict[str, Any]) -> None:
    for values in table["rows"].values():
        if isinstance(values, list):
            values.append(values[0])


def _old_rows(table: dict[str, Any]) -> None:
    row = {"protocol": "wikitext2", "metric": "kl", "value": 1.0, "ci_low": 0.9, "ci_high": 1.1}
    table.update(rows=[row])
    del table["format"]


FIRST_VALUE = re.compile(rb'("value": \[)[^,\]]+')
CELLS: dict[str, Damage] = {
    "half of a file": lambda c: c[: len(c) // 2],
    "a value changed by hand": value("value", 1.0, by_hand),
    "another cell's file": whole(cell="other"),
    "an empty file": lambda c: b"",
    "a last byte that is missing": lambda c: c[:-1],
    "a row copied by hand": by_hand(_copy_a_row),
    "a digest that is missing": by_hand(lambda t: t.pop("digest")),
    "JSON that is no cell": lambda c: b'{"hello": "world"}',
    "one bit flipped": lambda c: c.replace(b'"value"', b'"valud"', 1),
    "a byte-order mark": lambda c: b"\xff\xfe" + c,
    "the format before typed rows": edited(_old_rows),
    "a later format": whole(format=3),
    "another study's file": part("study", name="other"),
    "a study without a question": edited(lambda t: t["study"].pop("question")),
    "a study with a column of no type": part("study", columns={"layer": "complex"}),
    "a study that gives value another type": part("study", columns={"value": "str"}),
    "a column's name with an escape sequence": part("study", columns={"\x1b[2J": "int"}),
    "a column that nobody declared": value("colour", "red"),
    "a column that is told once": value("commit", "0" * 12),
    "a column that is too short": part("rows", value=[1.0]),
    "a value that is text": value("value", "2.5"),
    "a value that is a table": value("value", {"a": 1}),
    "a value of NaN": value("value", float("nan")),
    "a value of 400 digits": value("value", 10**400),
    "a value of 1e999": lambda c: FIRST_VALUE.sub(rb"\g<1>1e999", c, count=1),
    "a negative number of agents": value("n_agents", -1),
    "a truth that is a number": value("bos", 1),
    "a lone surrogate in a name": value("model", "\ud800"),
    "a lone surrogate in a question": part("study", question="\ud800"),
    "a name that is a number": value("model", 7),
    "a row without a metric": value("metric", None),
    "rows without metrics": edited(lambda t: t["rows"].pop("metric")),
    "metrics that are one text": part("rows", metric="kl"),
    "rows that are a list": whole(rows=[{"metric": "kl", "value": 1.0}]),
    "a provenance without a date": edited(lambda t: t["provenance"].pop("created_at")),
    "answers that are text": whole(answers="yes"),
    "another cell's name with a line break": whole(cell="x\n\x1b[2J"),
    "a list around a cell": lambda c: b"[" + c + b"]",
    "deep JSON": lambda c: b"[" * 100_000 + b"]" * 100_000,
    "bytes that are not UTF-8": lambda c: c.replace(b'"rows"', b'"\xff\xfe"'),
    "forty megabytes of spaces": lambda c: c + b" " * (40 << 20),
}  # fmt: skip

ROWS, TABLE = "rows.csv.gz", "cells.json.gz"


def repacked(
    root: Path, change: Callable[[str, dict[str, Any]], str], right_digests: bool = True
) -> None:
    """The packed results of a folder, changed: `change` is given the rows as CSV, and the table to edit in place."""
    rows = gzip.decompress((root / ROWS).read_bytes()).decode()
    table = json.loads(gzip.decompress((root / TABLE).read_bytes()))
    rows = change(rows, table)
    if right_digests:
        if "rows" in table:
            table["rows"] = hashlib.sha256(rows.encode("utf-8", "replace")).hexdigest()
        table = sealed(table)
    (root / ROWS).write_bytes(gzip.compress(rows.encode("utf-8", "replace")))
    (root / TABLE).write_bytes(gzip.compress(json.dumps(table).encode()))


def _table(
    change: Callable[[dict[str, Any]], Any], right_digests: bool = True
) -> Callable[[Path], None]:
    def both(rows: str, table: dict[str, Any]) -> str:
        change(table)
        return rows

    return lambda root: repacked(root, both, right_digests)


def _rows(change: Callable[[str], str], right_digests: bool = True) -> Callable[[Path], None]:
    return lambda root: repacked(root, lambda rows, table: change(rows), right_digests)


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes()))


ARCHIVES: dict[str, Callable[[Path], Any]] = {
    "no rows": lambda root: (root / ROWS).unlink(),
    "no table": lambda root: (root / TABLE).unlink(),
    "half of the rows": _bytes(ROWS, lambda c: c[: len(c) // 2]),
    "half of the table": _bytes(TABLE, lambda c: c[: len(c) // 2]),
    "a byte changed inside": _bytes(ROWS, lambda c: c[:40] + bytes([c[40] ^ 255]) + c[41:]),
    "bytes after the end": _bytes(ROWS, lambda c: c + b"more"),
    "an LFS pointer": _bytes(TABLE, lambda c: b"version https://git-lfs.github.com/spec/v1"),
    "a value changed by hand": _rows(lambda rows: rows.replace("2.5", "1.5", 1), right_digests=False),
    "a row deleted by hand": _rows(lambda rows: rows[: rows.rindex("\r\n", 0, -2) + 2], right_digests=False),
    "settings changed by hand": _table(lambda t: t["cells"][0]["config"].update(seed=1), right_digests=False),
    "a later format": _table(lambda t: t.update(format=3)),
    "a value that is text": _rows(lambda rows: rows.replace("2.5", "cheap", 1)),
    "a value of NaN": _rows(lambda rows: rows.replace("2.5", "nan", 1)),
    "a value of 1e999": _rows(lambda rows: rows.replace("2.5", "1e999", 1)),
    "a column that is missing": _rows(lambda rows: rows.replace("value", "valud", 1)),
    "rows of a cell that is not listed": _table(lambda t: t["cells"].clear()),
    "a cell that is listed twice": _table(lambda t: t["cells"].append(t["cells"][0])),
    "a study with a column of no type": _table(lambda t: t["cells"][0]["study"]["columns"].update(layer="complex")),
    "a date that is a number": _table(lambda t: t["cells"][0]["provenance"].update(created_at=2026)),
    "a table that is a list": _bytes(TABLE, lambda c: gzip.compress(b"[]")),
    "deep JSON": _bytes(TABLE, lambda c: gzip.compress(b"[" * 100_000)),
}  # fmt: skip


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
def cards(draw: st.DrawFn) -> bytes:
    """A committed card after one to three edits of its fields, its header or its payload."""
    parts = take_apart(SEEDS[draw(st.sampled_from(sorted(SEEDS)))])
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
    return json.dumps(table if draw(st.booleans()) else sealed(table)).encode()
