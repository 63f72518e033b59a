"""What an architecture keeps in its cache: measured, not guessed from the names of its config's attributes."""

import time
from dataclasses import asdict

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from polykv.errors import PolyKVError
from polykv.evaluation.capacity import Architecture
from polykv.geometry import Geometry
from polykv.models import load_config
from polykv.pool import prefill
from polykv.probe import LayerShape
from polykv.supported import check_model

FALCON_7B = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
             "num_hidden_layers": 80, "vocab_size": 128256}  # fmt: skip
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
TINY_LLAMA = {**TINY, "intermediate_size": 48, "num_key_value_heads": 2}


def test_multi_query_has_one_kv_head():
    cfg = OmegaConf.create({"name": "falcon-7b", "dtype": "bfloat16", "geometry": FALCON_7B})
    found = Architecture.of(load_config(cfg), cfg.dtype)
    assert found.geometry == Geometry.even(32, 1, 64)
    assert found.token_bytes == 2 * 32 * 64 * 2  # keys and values, layers, head_dim, bytes of bf16
    assert found.attention_flops == 4 * 71 * 64 * 32
    assert Geometry.of(load_config(cfg)) == found.geometry


@pytest.mark.parametrize(
    "options", [{}, {"multi_query": False}, {"new_decoder_architecture": True, "num_kv_heads": 2}]
)
def test_geometry_is_that_of_a_real_cache(options):
    config = AutoConfig.for_model("falcon", **TINY, **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    kept = [layer.keys.shape for layer in prefill(model, torch.tensor([[1, 2, 3]])).layers]
    assert Geometry.of(config).layers == tuple(LayerShape(heads, dim) for _, heads, _, dim in kept)


def test_a_config_that_contradicts_its_cache_is_refused():
    config = AutoConfig.for_model("falcon", **TINY, num_key_value_heads=4)
    with pytest.raises(PolyKVError, match=r"falcon.*num_key_value_heads=4.*\b1\b"):
        Geometry.of(config)


def test_layers_that_differ_have_no_one_shape():
    even, uneven = Geometry.even(2, 4, 8), Geometry((LayerShape(4, 8), LayerShape(1, 16)))
    assert even.shape == (4, 8) and even.values_per_token == 2 * 2 * 32
    assert uneven.values_per_token == 2 * (32 + 16) and uneven.n_layers == 2
    with pytest.raises(PolyKVError, match="16"):
        _ = uneven.shape


def test_seventy_billion_parameters_take_no_time_and_change_no_seed():
    config = AutoConfig.for_model("llama", **LLAMA_70B)
    torch.manual_seed(0)
    state, before = torch.get_rng_state(), time.process_time()
    assert Geometry.of(config) == Geometry.even(80, 8, 128)
    assert time.process_time() - before < 5
    assert torch.equal(torch.get_rng_state(), state)
    before = time.process_time()
    Geometry.of(AutoConfig.for_model("llama", **LLAMA_70B))
    assert time.process_time() - before < 0.2


def test_quantized_weights_and_other_attention_change_nothing():
    config = AutoConfig.for_model("llama", **TINY_LLAMA)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config._attn_implementation = "eager"
    before = asdict(Geometry.of(config)), config.to_dict()
    assert (
        before[0]["layers"]
        == ({"n_kv_heads": 2, "head_dim": 8, "n_heads": 4, "window": None, "state": None},) * 3
    )
    assert config.to_dict() == before[1] and config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {"is_causal": False}), ("gemma", {"use_bidirectional_attention": True})],
)
def test_attention_both_ways_is_refused(architecture, options):
    config = AutoConfig.for_model(architecture, **TINY_LLAMA, head_dim=8)
    check_model(config)
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(PolyKVError, match=architecture):
        check_model(config)
