"""Requests of lm-eval: what a generative one asks for, and whether a model can answer it under these terms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PretrainedConfig

from polykv.errors import PolyKVError
from polykv.supported import check_length, check_rope

MAX_GEN_TOKS = 256  # of a task that names no limit, as in lm-eval's own models
# Settings of generation that leave a greedy answer as it is, with the values for which they do; (): any.
HARMLESS = {
    "do_sample": (False,),
    "temperature": (),
    "top_k": (),
    "top_p": (),
    "min_p": (),
    "num_beams": (1,),
}


@dataclass(frozen=True)
class Limits:
    """Where an answer ends: before the first of the texts `until`, or after `max_tokens` tokens."""

    until: tuple[str, ...]
    max_tokens: int

    @classmethod
    def of(cls, gen_kwargs: Mapping[str, Any], what: str) -> "Limits":
        """The limits in a task's `generation_kwargs`. `what`: the request, for messages.

        Raises:
            PolyKVError: an answer that is not greedy, or has no tokens.
        """
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(gen_kwargs), MAX_GEN_TOKS))
        until, max_tokens = wanted.pop("until"), wanted.pop("max_gen_toks")
        for name, value in wanted.items():
            if name not in HARMLESS or (HARMLESS[name] and value not in HARMLESS[name]):
                raise PolyKVError(
                    f"{what} asks for {name}={value}, and answers are greedy; use a task without it, or "
                    "--gen_kwargs do_sample=false,temperature=0"
                )
        if max_tokens < 1:
            raise PolyKVError(f"{what} has max_gen_toks={max_tokens}; give 1 or more")
        return cls(tuple(text for text in until if text), max_tokens)

    def cut(self, text: str) -> str:
        """An answer's text before the first of `until`."""
        return min((text.partition(stop)[0] for stop in self.until), key=len, default=text)


def check_fits(config: PretrainedConfig, n_prompt: int, n_after: int, what: str) -> None:
    """Check that a request has tokens to read and to write, and that the model has positions for them.

    Raises:
        PolyKVError: `what` is empty or too long.
    """
    if not n_prompt or not n_after:
        raise PolyKVError(f"{what} is empty; use a task whose prompts and answers have a text")
    check_length(config, n_prompt + n_after, what)
    check_rope(config, n_prompt - 1, n_prompt + n_after, what)
