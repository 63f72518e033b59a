"""Forged files: cards and cells edited at will, and the digest made right again.

A fuzzer that only flips bytes never gets past the digest. This is the format written a second time, apart
from the reader's own code, so that a mistake in the reader is not made here too.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

KEY = "polykv_card"
ZEROS = b"0" * 64
_DIGEST, _SIGNATURE = (
    re.compile(rb'(\\"' + name + rb'\\":\\")([0-9a-f]{64})') for name in (b"digest", b"signature")
)


@dataclass
class Parts:
    """A card taken apart; `fields` are the card's own, inside the safetensors header."""

    header: dict[str, Any]
    fields: dict[str, Any]
    payload: bytearray


def take_apart(content: bytes) -> Parts | None:
    """The parts of a card, or None where it is too broken to have any."""
    n_header = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + n_header])
        fields = json.loads(header["__metadata__"][KEY])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(header, dict) or not isinstance(fields, dict):
        return None
    return Parts(header, fields, bytearray(content[8 + n_header :]))


def put_together(parts: Parts) -> bytes:
    """The file of these parts, with a right digest wherever it has a place for one."""
    inner = json.dumps(parts.fields, sort_keys=True, separators=(",", ":"))
    header = dict(parts.header)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"] = header["__metadata__"] | {KEY: inner}
    return with_header(json.dumps(header, separators=(",", ":")), parts.payload)


def with_header(text: str, payload: bytes) -> bytes:
    """A file of a header's text, padded as safetensors does, and a right digest."""
    head = text.encode("utf-8", "surrogatepass")
    head += b" " * (-len(head) % 8)
    return with_digest(len(head).to_bytes(8, "little") + head + bytes(payload))


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


def sealed(table: dict[str, Any]) -> dict[str, Any]:
    """A cell file's table with a right digest, where it had one."""
    kept = {key: value for key, value in table.items() if key != "digest"}
    if kept == table:
        return table
    return kept | {"digest": hashlib.sha256(json.dumps(kept).encode()).hexdigest()}
