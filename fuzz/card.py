"""The fuzz target of the card reader, `CacheCard.from_bytes`."""

import sys

import atheris

with atheris.instrument_imports(include=["polykv"]):
    from fuzz.promises import check_card

from fuzz.mutate import mutate_card
from fuzz.tiny import any_model, tiny_model

MODEL = tiny_model()


def read(content: bytes) -> None:
    check_card(content, MODEL)


def mutate(content: bytes, size: int, seed: int) -> bytes:
    return mutate_card(content, size, seed, atheris.Mutate)


if __name__ == "__main__":
    any_model.start()
    atheris.Setup(sys.argv, read, custom_mutator=mutate)
    atheris.Fuzz()
