"""A handoff between two processes: one agent reads a document and seals its cache, the other answers from the card.

The card file is all that they share. The receiver verifies it and never sees the text.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

QUERY = " Q: What is Bea's pet? A:"  # known only to the second agent


def send(path: str) -> None:
    """The first agent: read, seal, save."""
    import polykv
    from polykv.pool import prefill
    from polykv.reference.documents import generate_document
    from polykv.tokens import encode

    model, tokenizer = polykv.load_model("reference")
    text = generate_document(tokenizer, 512, seed=3).text
    ids_BT = encode(tokenizer, text, begins=True)
    cache = prefill(model, ids_BT)
    card = polykv.CacheCard.seal(
        cache, ids_BT[0], model, tokenizer, policy="uniform", budget_bits=4.0, sender="reader"
    )
    card.save(path)
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    print(f"process {os.getpid()} read {card.n_tokens} tokens: {text[:60]}...")
    size = f"{card.nbytes:,} bytes, for a cache of {full:,}"
    print(f"    and sealed them at {card.mean_bits:.2f} bits a value: {size}")


def receive(path: str) -> None:
    """The second agent: verify the card, dequantize it, answer."""
    import polykv
    from polykv.pool import generate
    from polykv.tokens import encode

    model, tokenizer = polykv.load_model("reference")
    card = polykv.CacheCard.open(path, model, tokenizer)
    ids_T = encode(tokenizer, QUERY)[0]
    (answer,) = generate(model, tokenizer, card.dequantize(), [ids_T], 24)
    print(f"process {os.getpid()} opened the card of {card.metadata.sender!r} and was asked")
    print(f"   {QUERY}{answer}")
    content = card.to_bytes()
    content[-1] ^= 1
    try:
        polykv.CacheCard.from_bytes(content, model, tokenizer)
    except polykv.CardError as error:
        print(f"    with one bit flipped on the way: {error}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "card.safetensors")
        for role in ("send", "receive"):
            subprocess.run([sys.executable, __file__, role, path], check=True)


if __name__ == "__main__":
    role, *given = sys.argv[1:] or ["main"]
    {"main": main, "send": send, "receive": receive}[role](*given)
