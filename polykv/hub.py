"""Availability of hub repositories, checked once and quickly before long work starts."""

import re
from functools import lru_cache
from pathlib import Path

import httpx
from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound

from polykv.errors import PolyKVError

SECONDS = 5  # timeout
COMMIT = re.compile("[0-9a-f]{40}")


def check_reachable(repo: str, kind: str, remedy: str, revision: str | None = None) -> None:
    """Check that `repo` (at `revision`, if given) is in the local cache or the hub answers.

    Raises:
        PolyKVError: neither; the message ends with `remedy`.
    """
    if not is_available(repo, revision):
        wanted = f"{repo} at {revision[:12]}" if revision else repo
        raise PolyKVError(
            f"{kind} {wanted} is not in the hub's local cache and the hub at {constants.ENDPOINT} "
            f"cannot be reached; connect, or {remedy}"
        )


@lru_cache(maxsize=32)
def is_available(repo: str, revision: str | None = None) -> bool:
    """Whether `repo` is in the local cache or the hub answers; checked once per process."""
    return in_cache(repo, revision) or answers()


def commit(repo: str, revision: str) -> str:
    """The commit of a model's revision in the local cache; the revision itself if it is not cached."""
    if COMMIT.fullmatch(revision):
        return revision
    cached = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else revision


def in_cache(repo: str, revision: str | None = None) -> bool:
    """Whether the local cache holds `repo` at a commit or branch (None: at any)."""
    try:
        kept = [
            r for entry in scan_cache_dir().repos if entry.repo_id == repo for r in entry.revisions
        ]
    except CacheNotFound:
        return False
    return any(revision is None or revision == r.commit_hash or revision in r.refs for r in kept)


@lru_cache(maxsize=1)
def answers() -> bool:
    """Whether the hub answers within a few seconds."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=SECONDS, follow_redirects=True)
    except httpx.HTTPError:
        return False
    return True
