"""What the caches of peers.py cost in quality: KL divergence of each to the same model in fp32, on the same documents.

python benchmarks/peers_kl.py /my/model.gguf --python /venv/with/llama-cpp-python/bin/python

The documents are those of experiment=protocols. Each value is the mean over documents of KL in nats per scored token:

- to fp32: from the model in fp32 (the weights of the file, dequantized) with an uncompressed cache. All that a side
  rounds counts: its weights and activations too. llama.cpp rounds activations to 8 bits where weights are quantized.
- of the cache: from the uncompressed cache of the same side, which is all that the cache itself costs.

Each cache is used as in peers.py: llama.cpp's prefill writes and reads the quantized cache (llama_cpp_side.py), ours is
compressed after an exact prefill and read in place. Documents that the CSV has are not scored again.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from report import OUT, begun, processor, show

from experiments import sweep
from experiments.session import Session
from polykv.config import CONF
from polykv.documents import Document
from polykv.evaluation.continuation import compare
from polykv.evaluation.readings import Reading
from polykv.recipe import load_recipe
from polykv.results import provenance

SIDE = Path(__file__).with_name("llama_cpp_side.py")
# llama.cpp's types and their bits per value; the first is the uncompressed one.
LLAMA_CPP = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
FULL = "full"
DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    for name, value in (("documents", 8), ("context", 1024), ("batch", 512), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--recipes", nargs="+", default=["polykv", "waterfill_4", "trellis_4"])
    parser.add_argument("--python", required=True, help="a Python that has llama-cpp-python")
    parser.add_argument("--csv", type=Path, default=OUT / "peers_kl.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tell(measured(arguments))


def settled(arguments: argparse.Namespace, dtype: str) -> DictConfig:
    """The settings of the documents and of the model in this dtype, read in place."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"n_documents={arguments.documents}", f"context={arguments.context}"]
        overrides += ["experiment=protocols", "model=gguf", f"model.path={arguments.model}"]
        overrides += [f"model.dtype={dtype}", "reader=in_place", "backend=cpu", "protocol=paper"]
        return sweep.prepare(compose("config", overrides)).settled


def measured(arguments: argparse.Namespace) -> pd.DataFrame:
    """The rows of all documents; those of each are written to the CSV when it is done."""
    configs = {dtype: settled(arguments, dtype) for dtype in DTYPES}
    of_dtypes = [Session().full_readings(cfg) for cfg in configs.values()]
    shared = {"model": configs[DTYPES[0]].model.digest, "context_tokens": arguments.context}
    shared |= {"recipes": " ".join(arguments.recipes), "batch": arguments.batch}
    rows = begun(arguments.csv, shared)
    for readings in zip(*of_dtypes, strict=True):
        shared["text"] = readings[0].document.digest
        if len(rows) and (rows["text"] == shared["text"]).any():
            continue
        shared |= {"machine": processor()} | {k: provenance()[k] for k in ("commit", "created_at")}
        found = pd.DataFrame(of_document(arguments, readings)).assign(**shared)
        print(found[["side", "cache", "to_fp32"]].to_string(index=False), flush=True)
        rows = pd.concat([rows, found])
        rows.to_csv(arguments.csv, index=False)
    return rows


def of_document(
    arguments: argparse.Namespace, readings: tuple[Reading, ...]
) -> Iterator[dict[str, Any]]:
    """Rows of both programs; `readings`: the document in each of DTYPES, uncompressed."""
    document = readings[0].document
    exact_TV = readings[0].log_probs_TV
    for name, reading in zip(DTYPES, readings, strict=True):
        scored = {FULL: (reading.log_probs_TV, 8.0 * reading.model.dtype.itemsize)}
        for recipe in arguments.recipes:
            own = reading.under(load_recipe(recipe), "cpu")
            scored[recipe] = own.score(), 16 / own.pool.stored_ratio
        yield from rows_of(f"polykv, {name}", scored, exact_TV, document)
    with tempfile.TemporaryDirectory() as place:
        yield from rows_of(
            "llama.cpp", of_llama_cpp(arguments, document, Path(place)), exact_TV, document
        )


def of_llama_cpp(
    arguments: argparse.Namespace, document: Document, place: Path
) -> dict[str, tuple[torch.Tensor, float]]:
    """llama.cpp's log-probabilities and bits per value, by cache type."""
    np.save(place / "ids.npy", document.ids_BT[0].numpy())
    options = {"model": arguments.model, "prefix": document.n_prefix}
    options |= {"batch": arguments.batch, "threads": arguments.threads}
    command = [arguments.python, str(SIDE), str(place), "--only-file", "--caches"]
    command += [f"{cache}/{cache}" for cache in list(LLAMA_CPP)[1:]]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    subprocess.run(command, check=True)
    return {
        cache: (torch.from_numpy(np.load(place / f"file-{cache}-{cache}.npy")), bits)
        for cache, bits in LLAMA_CPP.items()
    }


def rows_of(
    side: str,
    scored: dict[str, tuple[torch.Tensor, float]],
    exact_TV: torch.Tensor,
    document: Document,
) -> Iterator[dict[str, Any]]:
    """Rows of a side; `scored`: log-probabilities and bits per value by cache, the uncompressed one first."""
    own_TV = next(iter(scored.values()))[0]
    for cache, (other_TV, bits) in scored.items():
        yield {
            "side": side,
            "cache": cache,
            "bits": bits,
            "to_fp32": float(compare(exact_TV, other_TV, document.rest_BT).kl.mean()),
            "of_cache": float(compare(own_TV, other_TV, document.rest_BT).kl.mean()),
        }


def tell(rows: pd.DataFrame) -> None:
    means = rows.groupby(["side", "cache"], sort=False)[["bits", "to_fp32", "of_cache"]].mean()
    lines = [
        [f"{side}, {cache}", f"{bits:.2f}", f"{to_fp32:.2g}", f"{of_cache:.2g}"]
        for (side, cache), (bits, to_fp32, of_cache) in means.iterrows()
    ]
    n, tokens = rows["text"].nunique(), rows["context_tokens"].iloc[0]
    title = f"KL in nats per token; {n} documents of {tokens} tokens, the last 30 % scored"
    show(title, ["", "bits a value", "KL to fp32", "KL of the cache"], lines, [])


if __name__ == "__main__":
    main()
