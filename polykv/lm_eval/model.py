"""The model class that lm-eval knows as `polykv`.

All tokens of a prompt but the last are prefilled and compressed; the last one is the query that reads them. It and what
is generated or scored after it stay uncompressed, unless the recipe has a codec for them (`suffix`). A pool so holds
the question too, unlike in experiment=shared_tasks: a recipe that drops tokens by attention has seen what is asked.
"""

from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from omegaconf import OmegaConf
from tqdm import tqdm

from polykv import config, models, results, versions
from polykv.attention import cascade
from polykv.errors import PolyKVError
from polykv.evaluation import continuation
from polykv.greedy import greedy
from polykv.lm_eval.pools import Pools
from polykv.lm_eval.requests import Limits, check_fits
from polykv.loading import dtype_label
from polykv.pool import check_reader
from polykv.recipe import load_recipe
from polykv.supported import check_attention, check_every_token, check_model
from polykv.tokens import encode, opening

DEVICE = "cuda:0"  # what lm-eval passes if no --device is given, on machines without a GPU as well
ABOUT = "polykv"  # key of `get_model_info`, and of a cache of answers


@register_model("polykv")
class PolyKVLM(TemplateLM):
    """A causal language model under a recipe.

    Args:
        pretrained: a name in conf/model, a folder or a GGUF file.
        recipe: a name in conf/recipe.
        reader: the read mode, "dequantize" or "in_place".
        dtype: of weights and cache; "": the model's in conf/model.
        device, batch_size: lm-eval's options. Every prompt has a pool of its own, so the batch size is 1.

    Raises:
        PolyKVError: a wrong argument, or a model that has no pools; nothing is loaded then.
    """

    def __init__(
        self,
        pretrained: str = "",
        recipe: str = "",
        reader: str = "dequantize",
        dtype: str = "",
        device: str = "auto",
        batch_size: int | str = 1,
        **others: Any,
    ) -> None:
        super().__init__()
        _check_arguments(pretrained, recipe, batch_size, others)
        self.recipe = load_recipe(recipe)
        check_reader(reader)
        cfg = models.config_of(pretrained)
        cfg.dtype = dtype or cfg.dtype
        architecture = models.load_config(cfg)
        check_model(architecture)
        if self.recipe.keep:
            check_every_token(architecture, f"recipe {recipe!r}, which drops tokens,")
        if reader == "in_place":
            check_attention(architecture, "use reader=dequantize")
        else:
            self.recipe.check_exact_suffix(f"reader={reader}")
        if device == DEVICE and not torch.cuda.is_available():
            device = "cpu"
        self.model, self.tokenizer = models.load_weights(cfg, device)
        self._opening: str = self.tokenizer.decode(opening(self.tokenizer))
        self._pools = Pools(self.model, self.recipe, reader)
        settings = OmegaConf.to_container(config.load_group("recipe", recipe), resolve=True)
        self._identity = {
            "model": cfg.name,
            "weights": models.weights_label(cfg),
            "dtype": dtype_label(cfg),
            "recipe": settings,
            "reader": reader,
            "backend": self._pools.backend,
            "device": str(self.model.device),
            "versions": versions.of({"recipe": settings}, [cascade, continuation]),
        }

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """Whose chat template it is, for lm-eval's cache of requests."""
        return f"{self._identity['model']} {self._identity['weights']}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, with BOS if the tokenizer adds one and the text (a rendered chat) does not begin with it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._opening)
        return encode(self.tokenizer, string, add_special_tokens)[0].tolist()

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text.

        Raises:
            PolyKVError: there is no template, or it refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise PolyKVError(
                f"model {self._identity['model']!r} has no chat template; leave --apply_chat_template out"
            )
        try:
            return self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except TemplateError as error:
            raise PolyKVError(
                f"the chat template refuses a chat ({error}); leave out --system_instruction or --apply_chat_template"
            ) from error

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to its first stop text, an end token or its limit of tokens.

        Raises:
            PolyKVError: sampling, or a prompt that does not fit the model; no answer is generated then.
        """
        asked = []
        for number, request in enumerate(requests):
            (context, gen_kwargs), what = request.args, f"request {number}"
            limits = Limits.of(gen_kwargs, what)
            ids_T = torch.tensor(self.tok_encode(context), device=self.model.device)
            check_fits(self.model.config, len(ids_T), limits.max_tokens, what)
            asked.append((ids_T, limits))
        said = []
        progress = tqdm(asked, "answers from pools", disable=disable_tqdm)
        for request, (ids_T, limits) in zip(requests, progress, strict=True):
            cache = self._pools.cache(self._pools.of(ids_T[:-1]))
            terms = (limits.max_tokens, self.tokenizer, None, limits.until)
            with self._pools.reading():
                (answer_T,) = greedy(self.model, cache, [ids_T[-1:]], *terms)
            text = self.tokenizer.decode(answer_T, skip_special_tokens=True)
            said.append(limits.cut(text))
            self.cache_hook.add_partial("generate_until", request.args, said[-1])
        return said

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation after its context's pool, and whether greedy decoding writes it.

        Continuations of one context read one pool.
        """
        numbers_of = defaultdict(list)
        for number, (_, context, after) in enumerate(requests):
            check_fits(self.model.config, len(context), len(after), f"request {number}")
            numbers_of[tuple(context)].append(number)
        found: dict[int, tuple[float, bool]] = {}
        progress = tqdm(numbers_of.items(), "scores after pools", disable=disable_tqdm)
        for context, numbers in progress:
            pool = self._pools.of(torch.tensor(context[:-1], device=self.model.device))
            for number in numbers:
                texts, _, after = requests[number]
                rest_BT = torch.tensor([[context[-1], *after]], device=self.model.device)
                with self._pools.reading():
                    cache = self._pools.cache(pool)
                    scores_TV = continuation.score_rest(self.model, cache, rest_BT)
                log_prob = float(scores_TV.gather(1, rest_BT[0, 1:, None]).sum())
                if log_prob != log_prob:
                    raise PolyKVError(
                        f"a log-probability is NaN under recipe {self.recipe.name!r}; use dtype=float32"
                    )
                is_greedy = bool((scores_TV.argmax(-1) == rest_BT[0, 1:]).all())
                found[number] = (log_prob, is_greedy)
                self.cache_hook.add_partial("loglikelihood", texts, found[number])
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Refused: such a request has no context that could be compressed.

        Raises:
            PolyKVError: always.
        """
        raise PolyKVError(
            "loglikelihood_rolling scores a text from its first token on, so that no score reads a compressed cache; "
            "use tasks of output_type generate_until, loglikelihood or multiple_choice, or experiment=compare"
        )

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Keep answers in the file of `--use_cache`, which tells them apart by prompt alone.

        Raises:
            PolyKVError: it has answers of another model, recipe or reader.
        """
        super().set_cache_hook(cache_hook)
        answered = cache_hook.dbdict
        if answered is not None:
            if len(answered) and answered.get(ABOUT) != self._identity:
                raise PolyKVError(
                    f"{answered.filename} has answers of another model, recipe, dtype or reader; give --use_cache "
                    "another path"
                )
            answered[ABOUT] = self._identity

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into `config` of its results: what made the numbers, and the size of all pools."""
        made_by = {"version": version("polykv-harness"), "commit": results.commit()}
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self._identity["dtype"],
            ABOUT: self._identity | self._pools.sizes() | made_by,
        }


def _check_arguments(
    pretrained: str, recipe: str, batch_size: int | str, others: dict[str, Any]
) -> None:
    if others:
        raise PolyKVError(
            f"model polykv takes no {next(iter(others))}; there are: pretrained, recipe, reader, dtype"
        )
    if not pretrained:
        raise PolyKVError("--model_args names no pretrained; add pretrained=smollm2-135m, say")
    if not recipe:
        raise PolyKVError("--model_args names no recipe; add recipe=waterfill_4, say")
    if str(batch_size) != "1":
        raise PolyKVError(
            f"--batch_size {batch_size}: every prompt has a pool of its own; leave it out"
        )
