"""Validation of checkpoints: complete weights, no adapter, a tokenizer that matches the model.

transformers initializes missing weights randomly, drops unknown ones, ignores an adapter if peft is not installed, and
makes a tokenizer of special tokens only if the tokenizer's files are missing, with a warning at most.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from polykv.errors import PolyKVError

# Options of `from_pretrained`: return the missing weights too, and do not raise; `check_whole` does.
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
WHOLE = "give a checkpoint of the whole model, as save_pretrained writes it"
NAMED = 3  # weights or tokens named in a message


def check_whole(found: Mapping[str, Any], holder: object, remedy: str) -> None:
    """Check that all weights of a model come from its checkpoint.

    Args:
        found: the loading info of `from_pretrained` (REPORTED).
        holder: the checkpoint, for the message.
        remedy: what to do about it, for the message.

    Raises:
        PolyKVError: missing, unexpected or mismatched weights; names the `holder` and some of them.
    """
    mismatched = [
        f"{name} {(*stored,)} for {(*wanted,)}" for name, stored, wanted in found["mismatched_keys"]
    ]
    kinds = {
        "missing": found["missing_keys"],
        "unexpected": found["unexpected_keys"],
        "of another shape": mismatched,
    }
    problems = [
        f"{len(names)} {kind} ({_some(sorted(names))})" for kind, names in kinds.items() if names
    ]
    if problems:
        raise PolyKVError(
            f"{holder} does not hold the weights that its configuration describes: {', '.join(problems)}; {remedy}"
        )


@contextmanager
def report_as_refusal() -> Iterator[None]:
    """Context in which transformers does not log the table of problems that `check_whole` raises for."""

    def is_wanted(record: logging.LogRecord) -> bool:
        refused = record.funcName == "log_state_dict_report"
        return not refused or "CONVERSION" in record.getMessage()  # an error refers to this table

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


def check_adapter(place: str | Path, **revision: str) -> None:
    """Check that a folder or hub repository contains no adapter.

    Raises:
        PolyKVError: names the folder or repository.
    """
    if find_adapter_config_file(place, **revision):
        raise PolyKVError(
            f"{place} holds an adapter ({ADAPTER_CONFIG_NAME}), which would not be applied; merge it into its "
            "base model (peft: merge_and_unload, then save_pretrained), or give a folder without it"
        )


def check_vocabulary(tokenizer: Any, holder: object) -> None:
    """Check that a tokenizer has other tokens than special ones.

    Raises:
        PolyKVError: names the `holder`.
    """
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.added_tokens_decoder):
        raise PolyKVError(
            f"no tokenizer in {holder}; put the files of the model's tokenizer beside its weights "
            "(tokenizer.json, tokenizer_config.json)"
        )


def check_rows(model: PreTrainedModel, tokenizer: Any, holder: object) -> None:
    """Check that the model's embedding has a row for every token of the tokenizer.

    Added tokens (for padding or images, say) are exempt if neither the tokenizer nor its chat template inserts them.

    Raises:
        PolyKVError: names the `holder` and some of the tokens.
    """
    n_rows, template = model.get_input_embeddings().weight.shape[0], str(tokenizer.chat_template)
    added, around = tokenizer.added_tokens_decoder, tokenizer("").input_ids
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    beyond = [
        f"{token} ({index})"
        for token, index in ids
        if index >= n_rows and (index not in added or index in around or token in template)
    ]
    if beyond:
        raise PolyKVError(
            f"the tokenizer of {holder} has {len(beyond)} tokens beyond the {n_rows} rows of the model's "
            f"embedding: {_some(beyond)}; give the tokenizer that the model was trained with"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
