"""Initial weights that already hold an induction circuit; training refines it.

A document's value is found by its key, the two tokens before it. From a random start the circuit for
that (Olsson et al. 2022, In-context Learning and Induction Heads) did not form within 1.5 M tokens of
ours, a CPU's ten minutes; built in by construction it is there before the first step:

- layer 0, two heads attend one and two tokens back and write what they see into two slots;
- layer 1, two heads match (this token, the one before) with (one back, two back) of every earlier
  token, and copy the best match's content to the prediction.

Everything else starts random, and nothing is frozen.
"""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

HEAD = 64  # head_dim
CONTENT = slice(0, 128)  # residual dimensions of a token's identity
CONSTANT = 127  # the same for all tokens: what positions are asked with
ONE_BACK, TWO_BACK = slice(128, 192), slice(192, 256)  # slots
FAST = 8  # RoPE pairs that tell neighbours apart
SLOW = range(16, 32)  # RoPE pairs that hardly turn within a document: fit to carry content
EMBEDDING_STD = 0.1
CONSTANT_VALUE = 4 * EMBEDDING_STD
LOOK_BACK = 1.3  # gain of queries and keys in layer 0
MATCH = 1.7  # gain of queries and keys in layer 1
COPY = 0.15  # gain of what the matching heads write


@torch.no_grad()
def build_in_induction(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Set embeddings and the first two attention layers, in place; needs 2 key-value heads of 64."""
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, EMBEDDING_STD, generator=generator)
    embedding[:, ONE_BACK.start : TWO_BACK.stop] *= 0.1
    embedding[:, CONSTANT] = CONSTANT_VALUE
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    width = CONTENT.stop
    mix_SC = torch.linalg.qr(torch.randn(width, HEAD, generator=generator)).Q.mT
    _look_back(model, mix_SC)
    _match_and_copy(model, mix_SC)


def _look_back(model: LlamaForCausalLM, mix_SC: Tensor) -> None:
    """Layer 0: query heads 0 and 1 see one and two tokens back through key-value head 0."""
    attention = model.model.layers[0].self_attn
    turns = model.model.rotary_emb.inv_freq[:FAST]
    query, key = attention.q_proj.weight, attention.k_proj.weight
    key[:HEAD] = 0
    key[:FAST, CONSTANT] = LOOK_BACK
    attention.v_proj.weight[:HEAD] = 0
    attention.v_proj.weight[:HEAD, CONTENT] = mix_SC
    for head, (back, slot) in enumerate(((1, ONE_BACK), (2, TWO_BACK))):
        rows = slice(head * HEAD, (head + 1) * HEAD)
        query[rows] = 0
        query[rows][:FAST, CONSTANT] = LOOK_BACK * torch.cos(back * turns)
        query[rows][HEAD // 2 : HEAD // 2 + FAST, CONSTANT] = -LOOK_BACK * torch.sin(back * turns)
        attention.o_proj.weight[slot, rows] = EMBEDDING_STD * torch.eye(HEAD)


def _match_and_copy(model: LlamaForCausalLM, mix_SC: Tensor) -> None:
    """Layer 1: the first query head of each key-value head matches; each copies half the content."""
    attention = model.model.layers[1].self_attn
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    n = len(SLOW)
    this, before = slice(SLOW[0], SLOW[0] + n), slice(HEAD // 2 + SLOW[0], HEAD // 2 + SLOW[0] + n)
    eye = torch.eye(HEAD)
    for kv_head in range(2):
        pick = slice(kv_head * n, (kv_head + 1) * n)
        key = attention.k_proj.weight[kv_head * HEAD : (kv_head + 1) * HEAD]
        key.zero_()
        key[this, ONE_BACK] = MATCH * eye[pick]
        key[before, TWO_BACK] = MATCH * eye[pick]
        first = kv_head * group * HEAD
        query = attention.q_proj.weight[first : first + HEAD]
        query.zero_()
        query[this, CONTENT] = MATCH * mix_SC[pick]
        query[before, ONE_BACK] = MATCH * eye[pick]
        half = slice(kv_head * HEAD, (kv_head + 1) * HEAD)
        value = attention.v_proj.weight[half]
        value.zero_()
        value[:, half] = eye
        attention.o_proj.weight[half, first : first + HEAD] = COPY * eye
