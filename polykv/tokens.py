"""Text as token ids, the same way everywhere: BOS where a sequence begins, if the tokenizer adds one; EOS never.

A tokenizer may put tokens before a text (BOS, for most that do) and behind it (EOS). What comes before belongs to the
input that a model was trained on, and without it some models are far worse (Gemma). What comes behind ends the
sequence, while here a question, an answer or the rest of a document always follows. Text in a chat gets what the chat
template writes and nothing else (polykv/chat.py).
"""

from typing import Any

import torch
from torch import Tensor

from polykv.errors import PolyKVError

PROBE = "The first of 2."


def encode(tokenizer: Any, text: str, begins: bool = False) -> Tensor:
    """Ids (1, tokens) of a text; one that `begins` a sequence has the `opening` before it. It may be longer than the
    model: windows are cut from it.

    Raises:
        PolyKVError: as `opening`.
    """
    called = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)
    ids_BT = called.input_ids.to(torch.long)
    return opened(tokenizer, ids_BT) if begins else ids_BT


def opened(tokenizer: Any, ids_BT: Tensor) -> Tensor:
    """Ids (1, tokens) with the `opening` before them."""
    return torch.cat([torch.tensor([opening(tokenizer)], dtype=torch.long), ids_BT], dim=1)


def opening(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text: BOS, nothing, or what else its post-processor or flags say.

    Raises:
        PolyKVError: it is ambiguous which tokens of the encoded text they are.
    """
    own = tokenizer(PROBE, add_special_tokens=False).input_ids
    whole = tokenizer(PROBE).input_ids
    starts = [n for n in range(len(whole) - len(own) + 1) if whole[n : n + len(own)] == own]
    if len(starts) != 1:
        raise PolyKVError(
            f"the tokenizer reads {PROBE!r} as {own}, and with special tokens as {whole}: which of them open a text "
            "is ambiguous; use a tokenizer with a vocabulary for text"
        )
    return whole[: starts[0]]
