"""Tiny GGUF files, written as llama.cpp's converter writes a Llama: what its readers have to get back."""

import json

import gguf
import numpy as np

CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def tensors_of(model):
    """name -> values, under llama.cpp's names and in its order of rotary pairs."""
    heads = {
        "attn_q": model.config.num_attention_heads,
        "attn_k": model.config.num_key_value_heads,
    }
    found = {}
    for name, parameter in model.state_dict().items():
        values, block, rest = parameter.numpy(), "", name
        if name.startswith("model.layers."):
            layer, rest = name.split(".", 3)[2:]
            block = f"blk.{layer}."
        part = NAMES[rest.removesuffix(".weight")]
        if n := heads.get(part):
            halves = values.reshape(n, 2, len(values) // n // 2, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        found[f"{block}{part}.weight"] = values
    return found


def vocabulary_of(tokenizer):
    """Its tokens in the order of their ids, and its merges as GGUF writes them."""
    ids = tokenizer.get_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return sorted(ids, key=ids.get), [" ".join(pair) for pair in merges]


def write(path, model, tokenizer, quantization="F32", metadata=None, tensors=None):
    """A GGUF file of a Llama and a byte-level tokenizer.

    `quantization`: of its matrices. `metadata`: keys to set, or with None to leave out; `tensors` likewise.
    """
    c, kind = model.config, gguf.GGMLQuantizationType[quantization]
    vocabulary, merges = vocabulary_of(tokenizer)
    special = set(tokenizer.all_special_tokens)
    keys = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": int(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(quantization, f"MOSTLY_{quantization}")]),
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "llama.rope.dimension_count": c.head_dim,
        "llama.rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "llama.vocab_size": c.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocabulary],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": c.bos_token_id,
        "tokenizer.ggml.eos_token_id": c.eos_token_id,
        "tokenizer.ggml.padding_token_id": c.pad_token_id,
        "tokenizer.chat_template": CHAT,
    }  # fmt: skip
    keys |= metadata or {}
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture"))
    for key, value in keys.items():
        _add(writer, key, value)
    for name, values in (tensors_of(model) | (tensors or {})).items():
        if values is None:
            continue
        if values.ndim == 1 or quantization == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
