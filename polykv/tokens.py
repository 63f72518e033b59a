"""Tokenization of texts: with BOS at the start of a sequence, if the tokenizer adds one, and never with EOS.

Tokenizers may add tokens before a text (usually BOS) and after it (EOS). Models are trained with the former, and some
(Gemma) are far worse without. The latter would end the sequence, whereas here a question, an answer or the rest of a
document always follows. Text in chat format has exactly the special tokens of the chat template (polykv/chat.py).
"""

from typing import Any

import torch
from torch import Tensor

from polykv.errors import PolyKVError

PROBE = "The first of 2."


def encode(tokenizer: Any, text: str, begins: bool = False) -> Tensor:
    """Ids (1, tokens) of a text, with the `opening` if it `begins` a sequence. Not limited to the model's length.

    Raises:
        PolyKVError: as `opening`.
    """
    called = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)
    ids_BT = called.input_ids.to(torch.long)
    return opened(tokenizer, ids_BT) if begins else ids_BT


def opened(tokenizer: Any, ids_BT: Tensor) -> Tensor:
    """Ids (1, tokens) with the `opening` prepended."""
    return torch.cat([torch.tensor([opening(tokenizer)], dtype=torch.long), ids_BT], dim=1)


def opening(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer adds before a text, as its post-processor or flags say: usually BOS, or none.

    Raises:
        PolyKVError: they cannot be determined from an encoded text.
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


def last_places(ids_BT: Tensor, n_last: int = 1) -> Tensor:
    """Places of the last tokens (n_last,), for `logits_to_keep`.

    Given a number, transformers takes a slice, which is not contiguous: for it PyTorch copies the weights of the output
    layer, transposed, once per row.
    """
    n_tokens = ids_BT.shape[1]
    return torch.arange(n_tokens - n_last, n_tokens, device=ids_BT.device)
