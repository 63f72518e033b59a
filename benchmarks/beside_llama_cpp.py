"""KL divergence of quantized caches, llama.cpp's own beside ours: the same GGUF file, token ids and cache types.

python benchmarks/beside_llama_cpp.py /my/model.gguf --python /venv/with/llama-cpp-python/bin/python

The documents are those of experiment=protocols. Each value is the mean over documents of KL(exact cache || other cache)
in nats per scored token; the exact cache is that of the same program and weights:

- llama.cpp (llama_cpp_side.py), an f16 cache: with the weights of the file, where a product with quantized weights
  rounds activations to 8 bits, and with the same weights stored in fp32, where it does not. Recent versions rotate keys
  and values by a Hadamard matrix before they quantize them; `unrotated` switches that off. The noise floor is an f16
  cache read without flash attention: sums in another order.
- ours, an fp32 cache, weights and activations in fp32: protocols `online` (chunks of --batch tokens, as llama.cpp's)
  and `paper`. The floor is an fp16 cache. llama.cpp rounds queries to 8 bits where keys are quantized: `q8_0 queries`
  does so too. `rotated` puts a signed Hadamard matrix before the codec of keys, values and queries; `interleaved` has
  the channels of keys and queries in the order of a Llama model's GGUF file, where other ones share a scale.

Documents that the CSV has are not run again.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from report import OUT, begun, processor, show
from torch import nn
from transformers import PreTrainedModel

from experiments import sweep
from experiments.session import of_process
from polykv.attention.observe import observe
from polykv.codecs.base import Codec
from polykv.codecs.identity import Identity
from polykv.codecs.q4_0 import Q4_0
from polykv.codecs.q8_0 import Q8_0
from polykv.codecs.rotated import Rotated
from polykv.config import CONF
from polykv.documents import Document
from polykv.evaluation import online
from polykv.evaluation.continuation import compare
from polykv.evaluation.readings import Reading
from polykv.recipe import Recipe, load_recipe
from polykv.results import provenance


@dataclass(frozen=True)
class Interleaved(Rotated):
    """Channels with the two of a RoPE pair side by side, as GGUF files of Llama models have them, then `codec`."""

    def turned(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        return x_BHTD.float().unflatten(-1, (2, -1)).mT.flatten(-2)

    def turned_back(self, y_BHTD: torch.Tensor) -> torch.Tensor:
        return y_BHTD.float().unflatten(-1, (-1, 2)).mT.flatten(-2)


def same(codec: Codec) -> Codec:
    return codec


Wrap = Callable[[Codec], Codec]
SIDE = Path(__file__).with_name("llama_cpp_side.py")
CODECS: dict[str, Codec] = {"f16": Identity(dtype="float16"), "q8_0": Q8_0(), "q4_0": Q4_0()}
CACHES = ("q8_0/q8_0", "q4_0/q4_0", "q8_0/q4_0")  # keys/values
EXACT = "f16/f16"
SYSTEMS = {
    ("llama.cpp", "file"): "llama.cpp, file's weights",
    ("llama.cpp", "f32"): "llama.cpp, fp32 weights",
    ("ours", "online q8_0 queries rotated"): "ours, online, q8_0 queries, rotated",
    ("llama.cpp", "f32 unrotated"): "llama.cpp, fp32 weights, unrotated",
    ("ours", "online q8_0 queries interleaved"): "ours, online, q8_0 queries, interleaved",
    ("ours", "online q8_0 queries"): "ours, online, q8_0 queries",
    ("ours", "online"): "ours, online",
    ("ours", "paper"): "ours, paper",
}
# Variants of ours: what is put before the codec of keys and queries, and before that of values.
VARIANTS: tuple[tuple[str, Wrap, Wrap], ...] = (
    ("online q8_0 queries", same, same),
    ("online q8_0 queries interleaved", Interleaved, same),
    ("online q8_0 queries rotated", Rotated, Rotated),
)
APART = {"file": "the file's weights", "f32": "fp32 weights"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    for name, value in (("documents", 4), ("context", 1024), ("batch", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1, help="of each of the two programs")
    parser.add_argument("--python", required=True, help="a Python that has llama-cpp-python")
    parser.add_argument("--csv", type=Path, default=OUT / "beside_llama_cpp.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"n_documents={arguments.documents}", f"context={arguments.context}"]
        overrides += ["experiment=protocols", "model=gguf", f"model.path={arguments.model}"]
        overrides += ["protocol=online", f"chunk={arguments.batch}"]
        cfg = sweep.prepare(compose("config", overrides)).settled
    tell(measured(arguments, cfg))


def measured(arguments: argparse.Namespace, cfg: DictConfig) -> pd.DataFrame:
    """The rows of all documents; those of each are written to the CSV when it is done."""
    shared = {
        "model": cfg.model.get("digest", arguments.model.name),
        "context_tokens": cfg.context,
        "batch": cfg.chunk,
    }
    rows = begun(arguments.csv, shared)
    for reading in of_process().full_readings(cfg):
        shared["text"] = reading.document.digest
        if len(rows) and (rows["text"] == shared["text"]).any():
            continue
        shared |= {"machine": processor()} | {k: provenance()[k] for k in ("commit", "created_at")}
        rows = pd.concat([rows, pd.DataFrame(of_document(arguments, reading)).assign(**shared)])
        rows.to_csv(arguments.csv, index=False)
    return rows


def of_document(arguments: argparse.Namespace, reading: Reading) -> list[dict[str, Any]]:
    """Both programs' rows of one document; they run at the same time."""
    document, model, chunk = reading.document, reading.model, arguments.batch
    with tempfile.TemporaryDirectory() as place:
        np.save(Path(place) / "ids.npy", document.ids_BT[0].numpy())
        options = {"model": arguments.model, "prefix": document.n_prefix}
        options |= {"batch": chunk, "threads": arguments.threads}
        command = [arguments.python, str(SIDE), place, "--caches", *CACHES]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with subprocess.Popen(command) as llama_cpp:
            full_TV, _ = online.score(model, document, load_recipe("full"), chunk)
            found = list(ours(reading, full_TV, chunk))
        if llama_cpp.returncode:
            raise SystemExit("llama.cpp's side failed")
        found += json.loads((Path(place) / "kl.json").read_text())
        for weights in APART:
            their_TV = torch.from_numpy(np.load(Path(place) / f"{weights}-f16-f16.npy"))
            found.append(row("between", weights, EXACT, full_TV, their_TV, document))
    return found


def ours(reading: Reading, full_TV: torch.Tensor, chunk: int) -> Iterator[dict[str, Any]]:
    """Our rows, under both protocols; `full_TV`: scores online under the uncompressed cache."""
    model, document = reading.model, reading.document
    for cache in (EXACT, *CACHES):
        sides = [CODECS[name] for name in cache.split("/")]
        recipe = Recipe(cache, *sides)
        paper_TV = reading.under(recipe, "torch").score()
        yield row("ours", "paper", cache, reading.log_probs_TV, paper_TV, document)
        scored_TV, _ = online.score(model, document, recipe, chunk)
        yield row("ours", "online", cache, full_TV, scored_TV, document)
        if cache == EXACT:
            continue
        for variant, of_keys, of_values in VARIANTS:
            used = Recipe(cache, of_keys(sides[0]), of_values(sides[1]))
            with rounded_queries(model, of_keys(Q8_0())):
                scored_TV, _ = online.score(model, document, used, chunk)
            yield row("ours", variant, cache, full_TV, scored_TV, document)


def rounded_queries(model: PreTrainedModel, codec: Codec) -> AbstractContextManager[None]:
    """Context in which attention gets queries that `codec` encoded and decoded."""

    def see(layer: nn.Module, q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, scaling: float) -> None:
        q_BHTD.copy_(codec.decode(codec.encode(q_BHTD)))

    return observe(model, see)


def row(
    system: str,
    variant: str,
    cache: str,
    full_TV: torch.Tensor,
    other_TV: torch.Tensor,
    document: Document,
) -> dict[str, Any]:
    """The mean KL over the scored tokens of one document; also printed."""
    kl = float(compare(full_TV, other_TV, document.rest_BT).kl.mean())
    found = {"system": system, "variant": variant, "cache": cache, "kl": kl}
    print(json.dumps(found), flush=True)
    return found


def tell(rows: pd.DataFrame) -> None:
    """The table: systems by cache type, and the distance between the two programs."""
    mean = rows.groupby(["system", "variant", "cache"])["kl"].mean()

    def cell(*which: str) -> str:
        return f"{mean[which]:.2g}" if which in mean else "-"

    lines = [
        [name, *(cell(*which, cache) for cache in (EXACT, *CACHES))]
        for which, name in SYSTEMS.items()
    ]
    n, tokens = rows["text"].nunique(), rows["context_tokens"].iloc[0]
    title = f"Mean KL to the exact cache of the same program; {n} documents of {tokens} tokens, the last 30 % scored"
    notes = ["floor: llama.cpp's f16 cache without flash attention; our fp16 cache."]
    notes += [
        f"Our uncompressed run against llama.cpp's f16 run with {name}: KL {cell('between', weights, EXACT)}."
        for weights, name in APART.items()
    ]
    show(title, ["", "floor", *(f"K {c.replace('/', ', V ')}" for c in CACHES)], lines, notes)


if __name__ == "__main__":
    main()
