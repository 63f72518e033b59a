"""What is refused of a checkpoint: weights that are not its model's, an adapter, a tokenizer that does not fit.

transformers fills weights that it misses with random numbers, drops those that it does not know, leaves an adapter
out where peft is not installed, and makes a tokenizer of special tokens alone where there are no files of one. Where
it says so at all, it warns.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from polykv.errors import PolyKVError

# For `from_pretrained`: it returns which weights it did not find as well, and leaves all refusals to `check_whole`.
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
BARE = "give a checkpoint of the whole bare model, as save_pretrained writes it"
NAMED = 3  # of many weights or tokens


def check_whole(found: Mapping[str, Any], holder: object, mend: str) -> None:
    """Refuse a model some of whose weights are not its checkpoint's, by what `from_pretrained` says (REPORTED).

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
    said = [
        f"{len(names)} {kind} ({_some(sorted(names))})" for kind, names in kinds.items() if names
    ]
    if said:
        raise PolyKVError(
            f"{holder} does not hold the weights that its configuration describes: {', '.join(said)}; {mend}"
        )


@contextmanager
def report_as_refusal() -> Iterator[None]:
    """Within it, transformers does not print as a table what `check_whole` refuses in one line."""

    def is_wanted(record: logging.LogRecord) -> bool:
        refused = record.funcName == "log_state_dict_report"
        return not refused or "CONVERSION" in record.getMessage()  # its error refers to the table

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


def check_adapter(place: str | Path, **revision: str) -> None:
    """Refuse a folder or hub id that holds an adapter, alone or beside its base model.

    Raises:
        PolyKVError: names the place.
    """
    if find_adapter_config_file(place, **revision):
        raise PolyKVError(
            f"{place} holds an adapter ({ADAPTER_CONFIG_NAME}), which is not applied here; merge it into its "
            "base model (peft: merge_and_unload, then save_pretrained), or give a folder without it"
        )


def check_vocabulary(tokenizer: Any, holder: object) -> None:
    """Refuse a tokenizer that has special tokens alone.

    Raises:
        PolyKVError: names the `holder`.
    """
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.added_tokens_decoder):
        raise PolyKVError(
            f"no tokenizer in {holder}; put the files of the model's beside its weights (tokenizer.json, "
            "tokenizer_config.json)"
        )


def check_rows(model: PreTrainedModel, tokenizer: Any, holder: object) -> None:
    """Refuse a tokenizer with tokens that the model's embedding has no row for.

    Added tokens, as for padding or images, may be such where neither the tokenizer nor its chat template puts them.

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
