"""Signatures on cards that cross trust borders: HMAC-SHA256 with a key that sender and receiver hold.

Any card may come with a right digest: a digest finds damage, it proves no origin. A receiver that requires
a key refuses every card that a holder of this key did not sign, before any tensor is looked at. A signature
covers the whole file: token ids, tensors, sender, hop and parent cannot be changed, nor moved to another card.

It does not protect against
- reading: cards are not encrypted, and hold the text that the agents saw;
- replay: a signed card stays valid. Who must take each card once keeps the digests that were taken, and
  compares `about.parent` with the digest that was expected;
- a holder of the key: the key is shared, so each can sign as any `sender`, and can sign bad content;
- removal: a receiver without a key opens signed and unsigned cards alike, and `CacheCard.verified` is False.
"""

import hmac
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from polykv.errors import PolyKVError

LEAST, MOST = 32, 4096  # bytes of a key
OTHERS = stat.S_IRWXO | stat.S_IWGRP  # who may not have access: everyone, and the group to write
_CONTEXT = b"polykv card 1\0"  # so that the key signs nothing else by accident


@dataclass(frozen=True)
class SigningKey:
    """A secret of at least 32 random bytes; it never shows in messages or results."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.secret, bytes) or not LEAST <= len(self.secret) <= MOST:
            raise PolyKVError(
                f"a signing key takes {LEAST} to {MOST} random bytes; make one: "
                "head -c 32 /dev/urandom > card.key && chmod 600 card.key"
            )

    @classmethod
    def read(cls, path: str | Path) -> "SigningKey":
        """All bytes of a file, a last newline included.

        Raises:
            PolyKVError: no such file, too short or too long, or readable by everyone.
        """
        place = Path(path).expanduser()
        try:
            with open(place, "rb", opener=_without_waiting) as file:
                info = os.fstat(file.fileno())
                secret = file.read(MOST + 1) if stat.S_ISREG(info.st_mode) else b""
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PolyKVError(
                f"cannot read the signing key {path} ({reason}); give a file of {LEAST} random bytes"
            ) from error
        if os.name == "posix" and info.st_mode & OTHERS:
            raise PolyKVError(
                f"the signing key {path} can be read by everyone or written by its group "
                f"(mode {stat.S_IMODE(info.st_mode):o}); chmod 600 it, and make a new key if others had access"
            )
        if not LEAST <= len(secret) <= MOST:
            raise PolyKVError(
                f"the signing key {path} holds {info.st_size} bytes, not {LEAST} to {MOST}; "
                f"make one: head -c 32 /dev/urandom > {place.name} && chmod 600 {place.name}"
            )
        return cls(secret)

    def sign(self, digest: bytes) -> str:
        """64 hexadecimal digits."""
        return hmac.digest(self.secret, _CONTEXT + digest, "sha256").hex()

    def signed(self, digest: bytes, signature: str) -> bool:
        """True where this key made the signature; takes the same time wherever the two differ."""
        return hmac.compare_digest(self.sign(digest), signature)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe has no end to wait for
