"""Texts and problems in this package (polykv/texts; sources and licences in its README). Torch-free."""

import gzip
from functools import lru_cache
from pathlib import Path

from polykv import digests

TEXTS = Path(__file__).parent / "texts"
# Name of the document (conf/document), relay (conf/relay) or set of prompts (experiment=decode_drift) -> file.
FILES = {
    "moon_landing": "moon_landing.yaml",
    "packet_networks": "packet_networks.yaml",
    "wikitext2": "wikitext2_test.txt.gz",
    "wikitext2_evaluation": "wikitext2_test.txt.gz",
    "gsm8k": "gsm8k_test_300.jsonl",
    "writing": "writing_prompts.txt",
}


@lru_cache(maxsize=4)
def read(name: str) -> str:
    """The text of a document or relay, decompressed."""
    content = (TEXTS / FILES[name]).read_bytes()
    return (gzip.decompress(content) if FILES[name].endswith(".gz") else content).decode("utf-8")


def digest(name: str) -> str:
    """Digest of a document's or relay's file, for a cell's identity."""
    return digests.of_file(TEXTS / FILES[name], name)
