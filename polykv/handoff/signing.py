"""Signatures of cards that cross trust boundaries: HMAC-SHA256 with a key shared by sender and receiver.

A digest detects damage but not forgery, since anyone can compute it. A receiver that requires a key refuses all cards
that were not signed with it, before it looks at any tensor. The signature is of the whole file (polykv/handoff/
cardfile.py), so it covers every field of `CardMetadata` (fingerprints of model and tokenizer, geometry, dtypes, policy,
budget, position, hop, digest of the parent, sender, receiver, session), token ids and packed tensors.

A signed card stays valid, so it can be replayed. A receiver refuses the cards of other sessions or for other receivers
by naming its own (`CacheCard.open(.., key=key, session="a", receiver="checker")`; give each session a name that is
never used again). Within a session `parent=digest` accepts the next card of one card only. To accept each card once,
also store the digests of accepted cards.

It does not protect against
- reading: cards are not encrypted, and contain the text that the agents saw;
- replay to a receiver that names neither session nor parent;
- holders of the key, who can sign as any `sender` and can sign malicious content;
- removal: a receiver without a key opens signed and unsigned cards alike, and `CacheCard.verified` is False.
"""

import hmac
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from polykv.errors import PolyKVError

LEAST, MOST = 32, 4096  # bytes of a key
OTHERS = stat.S_IRWXO | stat.S_IWGRP  # forbidden: any access by others, writing by the group
_CONTEXT = b"polykv card 1\0"  # domain separation


@dataclass(frozen=True)
class SigningKey:
    """A secret of at least 32 random bytes, which never appears in messages or results."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.secret, bytes) or not LEAST <= len(self.secret) <= MOST:
            raise PolyKVError(
                f"a signing key takes {LEAST} to {MOST} random bytes; make one: "
                "head -c 32 /dev/urandom > card.key && chmod 600 card.key"
            )

    @classmethod
    def read(cls, path: str | Path) -> "SigningKey":
        """The key in a file: all of its bytes, including a trailing newline.

        Raises:
            PolyKVError: no such file, too short or too long, or accessible to others.
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
        """The signature: 64 hexadecimal digits."""
        return hmac.digest(self.secret, _CONTEXT + digest, "sha256").hex()

    def signed(self, digest: bytes, signature: str) -> bool:
        """Whether this key made the signature, compared in constant time."""
        return hmac.compare_digest(self.sign(digest), signature)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # do not block on a pipe
