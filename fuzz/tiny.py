"""The model that the seed cards belong to: two layers, two heads, eight dimensions."""

from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from polykv.handoff import fingerprint
from polykv.handoff.signing import SigningKey

N_TOKENS, MAX_TOKENS, VOCABULARY = 20, 64, 300
KEY = SigningKey(bytes(range(32)))  # signs the seeds named signed*, and nothing else

# Fingerprints change with the versions of torch and transformers; the committed seeds must outlive them.
# A context manager: inside, every model and tokenizer passes for the one that sealed the seeds.
any_model = patch.multiple(
    fingerprint, of_model=lambda model: "0" * 64, of_tokenizer=lambda tokenizer: "1" * 64
)


def tiny_model() -> LlamaForCausalLM:
    """Random weights, the same at every call."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    limits = {"vocab_size": VOCABULARY, "max_position_embeddings": MAX_TOKENS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **limits))
    return model.eval().requires_grad_(False)
