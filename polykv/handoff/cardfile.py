"""The file format of a card: a safetensors file whose metadata hold the card's fields and a digest of all bytes.

The digest is the SHA-256 of the file with the digest's own 64 characters set to "0". A signed card also has a signature
of the SHA-256 of the file with both set to "0"; its digest is then the SHA-256 of that hash and the signature, so that
one pass over the bytes computes both.

Files are not trusted: lengths, JSON, dtypes, shapes and offsets are checked against the file's size, then the digest,
then the signature if a key is required. Only then are tensors created, as views of the bytes.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from polykv.errors import PolyKVError
from polykv.handoff.signing import SigningKey

VERSION = 3  # of the format; 3: a tier of 2 bits, and 3 bits per token in the tier maps
KEY = "polykv_card"  # the only entry of the safetensors metadata
MAX_HEADER = 1 << 15  # bytes; the header of a card's 45 tensors at most takes 6 kB
MAX_TENSORS, MAX_DIMS = 48, 4
_ZEROS = "0" * 64
_DIGEST, _SIGNATURE = (
    re.compile(rb'\\"%s\\":\\"([0-9a-f]{64})\\"' % name) for name in (b"digest", b"signature")
)
_NAME = re.compile(r"[a-z0-9_.]{1,32}")
_ENTRY = {"dtype", "shape", "data_offsets"}
_DTYPES = {
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


class CardError(PolyKVError):
    """A card that cannot be read, written or trusted; the message gives the reason."""


@dataclass(frozen=True)
class Stamp:
    """Digest and signature of a file. `verified`: the signature was checked with a key and is valid."""

    digest: str
    signature: str | None = None
    verified: bool = False


def dumps(
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    key: SigningKey | None = None,
    signature: str | None = None,
) -> bytearray:
    """The file's bytes, signed with `key`, or with an existing `signature` of the same content."""
    inner = {**fields, "version": VERSION, "digest": _ZEROS}
    if key or signature:
        inner["signature"] = _ZEROS
    text = json.dumps(inner, sort_keys=True, separators=(",", ":"))
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = bytearray(save(kept, metadata={KEY: text}))
    plain = hashlib.sha256(content).digest()
    signature = key.sign(plain) if key else signature
    n_header = 8 + int.from_bytes(content[:8], "little")
    for pattern, found in ((_DIGEST, _digest(plain, signature)), (_SIGNATURE, signature)):
        if found:
            place = pattern.search(content, 0, n_header).start(1)
            content[place : place + 64] = found.encode()
    return content


def loads(
    content: bytearray, key: SigningKey | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], Stamp]:
    """Verify a file's bytes and return (fields, tensors, stamp); the tensors share the memory of `content`.

    Raises:
        CardError: truncated, altered, of another format version, not signed with `key`, or not a card.
    """
    header, start = _header(content)
    fields = _fields(header)
    table = _table(header, len(content) - start)
    stamp = _verified(content, start, key)
    if (fields.pop("digest", None), fields.pop("signature", None)) != (
        stamp.digest,
        stamp.signature,
    ):
        raise _altered("its digest is in the wrong place")
    tensors = {}
    for name, (dtype, shape, begin) in table.items():
        flat = torch.frombuffer(content, dtype=dtype, count=prod(shape), offset=start + begin)
        tensors[name] = flat.reshape(shape)
    return fields, tensors, stamp


def _header(content: bytearray) -> tuple[dict[str, Any], int]:
    """(safetensors header, offset of the payload)."""
    if len(content) < 8:
        raise _truncated(f"it has {len(content)} bytes")
    n_header = int.from_bytes(content[:8], "little")
    if n_header > MAX_HEADER:
        raise _altered(f"its header claims {n_header} bytes")
    if 8 + n_header > len(content):
        raise _truncated(f"its header alone takes {8 + n_header} of {len(content)} bytes")
    header = _parsed(bytes(content[8 : 8 + n_header]), "header")
    if n_header % 8:
        raise _altered("its tensors are not aligned")
    return header, 8 + n_header


def _fields(header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(metadata) != {KEY} or type(metadata[KEY]) is not str:
        raise CardError(
            "this safetensors file is not a card; give a file written by CacheCard.save"
        )
    fields = _parsed(metadata[KEY].encode("utf-8", "replace"), "table of fields")
    version = fields.pop("version", None)
    if type(version) is not int or not 1 <= version < 1 << 16:
        raise _altered("it has no format version")
    if version > VERSION:
        raise CardError(
            f"the card has format version {version} and this code reads up to {VERSION}; update polykv"
        )
    if version < VERSION:
        raise CardError(
            f"the card has format version {version}, which this code no longer reads (it reads {VERSION}); "
            "seal it again with this version of polykv"
        )
    return fields


def _parsed(text: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object strictly: no duplicate keys, no NaN or infinity, so that all parsers agree on it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("duplicate key")
        return dict(pairs)

    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        found = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(":")[0]
        raise _altered(f"its {what} is not valid JSON ({reason})") from error
    if not isinstance(found, dict):
        raise _altered(f"its {what} is not a JSON object")
    return found


def _table(header: dict[str, Any], n_payload: int) -> dict[str, tuple[torch.dtype, list[int], int]]:
    """name -> (dtype, shape, first byte); the tensors cover the payload without gap or overlap."""
    if len(header) > MAX_TENSORS:
        raise _altered(f"its header claims {len(header)} tensors")
    spans, table = [], {}
    for name, entry in header.items():
        if not _NAME.fullmatch(name) or not isinstance(entry, dict) or set(entry) != _ENTRY:
            raise _altered("an entry of its header is invalid")
        shape, offsets = entry["shape"], entry["data_offsets"]
        dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None or not _sizes(shape, 1) or not _sizes(offsets, 0) or len(offsets) != 2:
            raise _altered("a dtype, shape or offset of its header is invalid")
        begin, end = offsets
        if end - begin != prod(shape) * dtype.itemsize:
            raise _altered("a tensor's size does not match its shape")
        if begin % dtype.itemsize:
            raise _altered("a tensor is not aligned")
        spans.append((begin, end))
        table[name] = (dtype, shape, begin)
    last = 0
    for begin, end in sorted(spans):
        if begin != last:
            raise _altered("its tensors overlap or leave a gap")
        last = end
    if last > n_payload:
        raise _truncated(f"{last - n_payload} bytes of its tensors are missing")
    if last < n_payload:
        raise _altered(f"{n_payload - last} bytes follow its tensors")
    return table


def _sizes(found: Any, least: int) -> bool:
    """Whether it is a short list of integers in a plausible range."""
    is_list = type(found) is list and len(found) <= MAX_DIMS
    return is_list and all(type(size) is int and least <= size < 1 << 48 for size in found)


def _verified(content: bytearray, start: int, key: SigningKey | None) -> Stamp:
    """The stamp, after checking the digest, and the signature if a key is given."""
    head = bytes(content[:start])
    digests, signatures = _DIGEST.findall(head), _SIGNATURE.findall(head)
    if len(digests) != 1 or len(signatures) > 1:
        raise _altered("it has no digest")
    blank = bytearray(head)
    for place in (*_DIGEST.finditer(head), *_SIGNATURE.finditer(head)):
        blank[place.start(1) : place.end(1)] = _ZEROS.encode()
    sha = hashlib.sha256(blank)
    sha.update(memoryview(content)[start:])
    signature = signatures[0].decode() if signatures else None
    digest = _digest(sha.digest(), signature)
    if digest != digests[0].decode():
        raise _altered("its digest does not match its content")
    if key and signature is None:
        raise CardError("the card is not signed and a key is required; have its sender sign it")
    if key and not key.signed(sha.digest(), signature):
        raise CardError(
            "the card's signature is not by this key, or the card was altered since; use the key of its sender, "
            "or fetch it again"
        )
    return Stamp(digest, signature, verified=key is not None)


def _digest(plain: bytes, signature: str | None) -> str:
    """The digest, from the SHA-256 of the file with digest and signature zeroed."""
    return hashlib.sha256(plain + signature.encode()).hexdigest() if signature else plain.hex()


def _truncated(why: str) -> CardError:
    return CardError(f"the card is truncated: {why}; fetch it again")


def _altered(why: str) -> CardError:
    return CardError(f"the card was altered or damaged: {why}; fetch it again")
