"""llama.cpp's side of beside_llama_cpp.py: KL of each cache type to llama.cpp's own f16 cache, for one document.

python benchmarks/llama_cpp_side.py FOLDER ...     (beside_llama_cpp.py starts it, in an environment of its own)

FOLDER holds `ids.npy` (tokens,) and gets `kl.json`, and log-probabilities (scored tokens, vocabulary) in fp32:
`WEIGHTS-KEYS-VALUES.npy` for the file's weights under each cache, and for the same weights in fp32 under an f16 cache.
"""

import argparse
import ctypes
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from llama_cpp._ggml import libggml

EXACT = "f16/f16"
TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}  # enum ggml_type
NO_ROTATION = "LLAMA_ATTN_ROT_DISABLE"  # read by llama.cpp where it makes a cache
ALL_F32 = 0  # enum llama_ftype

Token = tuple[int, int, int, bool]  # id, position, sequence, whether its logits are wanted


def start_backends() -> None:
    """To be called once, first: a library whose CPU code comes in several builds loads the one for this machine."""
    libggml.ggml_backend_load_all_from_path(os.path.dirname(libggml._name).encode())
    lib.llama_backend_init()


class LlamaCpp:
    """One model file; `log_probs` runs documents through it."""

    def __init__(self, path: Path, threads: int) -> None:
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.threads = threads
        self.model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        self.n_vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def context(
        self, cache: str, n_tokens: int, batch: int, flash: bool = True, sequences: int = 1
    ) -> Any:
        """An empty cache of types KEYS/VALUES with room for `n_tokens`, which `sequences` share; to be freed.

        `flash`: with flash attention, without which llama.cpp reads no quantized values.
        """
        keys, values = cache.split("/")
        params = lib.llama_context_default_params()
        # Bindings and library may be of two versions, in which the fields are at other places.
        found = (params.type_k, params.type_v, params.n_ubatch, params.kv_unified)
        if found != (TYPES["f16"], TYPES["f16"], 512, False):
            sys.exit("llama-cpp-python and its libllama are of different versions; install it anew")
        params.n_ctx = -(-n_tokens // 256) * 256
        params.n_batch = params.n_ubatch = batch
        params.n_threads = params.n_threads_batch = self.threads
        params.n_seq_max, params.kv_unified = sequences, True
        params.flash_attn_type = int(flash)
        params.type_k, params.type_v = TYPES[keys], TYPES[values]
        context = lib.llama_init_from_model(self.model, params)
        if not context:
            sys.exit(f"llama.cpp has no cache of {keys} keys and {values} values for this model")
        return context

    def log_probs(
        self, ids_T: np.ndarray, n_prefix: int, cache: str, batch: int, flash: bool = True
    ) -> np.ndarray:
        """Log-probabilities (tokens after the prefix - 1, vocabulary) of each token after the prefix but the first."""
        context = self.context(cache, len(ids_T), batch, flash)
        tokens = [(int(one), place, 0, place >= n_prefix) for place, one in enumerate(ids_T)]
        found = []
        for start in range(0, len(tokens), batch):
            found += [row.copy() for row in self.decode(context, tokens[start : start + batch])]
        lib.llama_free(context)
        logits_TV = np.stack(found)[:-1].astype(np.float64)
        logits_TV -= logits_TV.max(-1, keepdims=True)
        return (logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))).astype(np.float32)

    def decode(self, context: Any, tokens: Sequence[Token]) -> list[np.ndarray]:
        """Evaluate a batch of tokens; the wanted logits, each (vocabulary,), which the next batch overwrites."""
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, (one, position, sequence, wanted) in enumerate(tokens):
            batch.token[place], batch.pos[place] = one, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = wanted
        failed = lib.llama_decode(context, batch)
        lib.llama_batch_free(batch)
        if failed:
            sys.exit(f"llama_decode failed at position {tokens[0][1]}")
        return [
            np.ctypeslib.as_array(lib.llama_get_logits_ith(context, place), (self.n_vocabulary,))
            for place, (*_, wanted) in enumerate(tokens)
            if wanted
        ]


def save_as_f32(source: Path, target: Path, threads: int) -> None:
    """The model with all weights in fp32, so that products with them do not round activations."""
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = ALL_F32, True, threads
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp cannot convert {source} to fp32")


def divergence(full_TV: np.ndarray, other_TV: np.ndarray) -> float:
    """Mean KL(full || other) in nats per token."""
    return float((np.exp(full_TV.astype(np.float64)) * (full_TV - other_TV)).sum(-1).mean())


def scores(folder: Path, weights: str, cache: str) -> Path:
    """The file of log-probabilities of a cache."""
    return folder / f"{weights}-{cache.replace('/', '-')}.npy"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--caches", nargs="+", required=True, help="KEYS/VALUES")
    for name in ("prefix", "batch", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--only-file", action="store_true", help="only the file's weights")
    arguments = parser.parse_args()
    start_backends()
    paths = {"file": arguments.model}
    if not arguments.only_file:
        paths["f32"] = arguments.folder / "f32.gguf"
        save_as_f32(arguments.model, paths["f32"], arguments.threads)
    found = []

    def add(variant: str, cache: str, other_TV: np.ndarray) -> None:
        kl = divergence(full_TV, other_TV)
        found.append({"system": "llama.cpp", "variant": variant, "cache": cache, "kl": kl})
        print(json.dumps(found[-1]), flush=True)

    document = np.load(arguments.folder / "ids.npy"), arguments.prefix
    for weights, path in paths.items():
        model = LlamaCpp(path, arguments.threads)
        full_TV = model.log_probs(*document, EXACT, arguments.batch)
        np.save(scores(arguments.folder, weights, EXACT), full_TV)
        add(weights, EXACT, model.log_probs(*document, EXACT, arguments.batch, flash=False))
        for cache in arguments.caches:
            other_TV = model.log_probs(*document, cache, arguments.batch)
            add(weights, cache, other_TV)
            if weights == "file":
                np.save(scores(arguments.folder, weights, cache), other_TV)
    if not arguments.only_file:
        os.environ[NO_ROTATION] = "1"
        for cache in arguments.caches:
            add("f32 unrotated", cache, model.log_probs(*document, cache, arguments.batch))
    (arguments.folder / "kl.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
