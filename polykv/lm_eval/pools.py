"""The pools of a run of lm-eval: one for each prompt, and how much they store together."""

from contextlib import AbstractContextManager

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from polykv import kernels
from polykv.attention.cascade import attend_in_place, read_unshared
from polykv.pool import SharedKVPool
from polykv.prefill import prefill
from polykv.recipe import Recipe


class Pools:
    """Makes pools under one recipe, counts their bytes, and has them read in one mode."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, reader: str) -> None:
        self._model, self._recipe, self._in_place = model, recipe, reader == "in_place"
        # As in run.py: what is not read in place has the same numbers on every machine.
        fast = "auto" if self._in_place else kernels.TORCH
        self.backend = kernels.pick_backend(fast, model.device)
        self._n_pools = self._n_tokens = self._n_values = self._n_bytes = 0

    def of(self, ids_T: Tensor) -> SharedKVPool | None:
        """The pool of these tokens (tokens,); None if there are none."""
        if not len(ids_T):
            return None
        pool = SharedKVPool.from_cache(
            prefill(self._model, ids_T[None]), self._recipe, self.backend
        )
        self._n_pools += 1
        self._n_tokens += pool.n_tokens
        # States count as fp16 values of as many bytes, as in `stored_ratio`.
        self._n_values += pool.n_values + pool.state_bytes // 2
        self._n_bytes += pool.stored_bytes
        return pool

    def cache(self, pool: SharedKVPool | None) -> Cache:
        """A cache of one row that continues the pool, to be used within `reading`.

        Raises:
            PolyKVError: no pool, and a recipe that quantizes the agents' own tokens.
        """
        if pool is None:
            self._recipe.check_exact_suffix("a prompt of one token, which has no pool,")
            return DynamicCache(config=self._model.config)
        return pool.reader(1) if self._in_place else pool.dequantize()

    def reading(self) -> AbstractContextManager[None]:
        """The context in which the model reads caches."""
        return (attend_in_place if self._in_place else read_unshared)(self._model)

    def sizes(self) -> dict[str, int | float | None]:
        """Of all pools so far; `stored_bits` are per cached value, every byte counted, None without a pool."""
        return {
            "pools": self._n_pools,
            "pooled_tokens": self._n_tokens,
            "stored_bytes": self._n_bytes,
            "stored_bits": 8 * self._n_bytes / self._n_values if self._n_values else None,
        }
