"""What codecs and measurements make of fixed input, as committed in outputs.json: `python tests/outputs.py` writes it.

An output that changes under an unchanged version would leave measured cells valid that are not: it is not written,
and tests/test_versions.py fails.
"""

import hashlib
import importlib
import inspect
import json
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

import polykv.codecs
from polykv.attention import cascade
from polykv.codecs.base import Codec
from polykv.codecs.context import LayerContext
from polykv.config import available, load_group
from polykv.documents import Document
from polykv.evaluation import (
    answers,
    continuation,
    decode_drift,
    gsm8k,
    layers,
    online,
    retrieval,
    statistics,
)
from polykv.evaluation.per_token import METRICS
from polykv.handoff import allocate, mixed, signals
from polykv.reference import documents as generated
from polykv.tasks.base import Task, placed
from polykv.tokens import encode

PLACE = Path(__file__).with_name("outputs.json")
RELATIVE = 1e-4  # sums in another order, on another machine, differ by less
N_TOKENS, DIM = 33, 64  # a short last group; rotations of 64 are exact on this input
Output = dict[str, Any]  # `bits`: digest of codes; `numbers`: of all else


def codec_classes() -> list[type[Codec]]:
    """Every codec of the package."""
    found = set()
    for module in pkgutil.iter_modules(polykv.codecs.__path__, "polykv.codecs."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(cls, Codec) and not inspect.isabstract(cls):
                found.add(cls)
    return sorted(found, key=lambda cls: cls.__name__)


def settings_of_codecs() -> list[dict[str, Any]]:
    """Each class with its defaults, and as the recipes here have it."""
    found = [{"_target_": f"{cls.__module__}.{cls.__qualname__}"} for cls in codec_classes()]
    for name in available("recipe"):
        recipe = OmegaConf.to_container(load_group("recipe", name))
        found += [recipe["key"], recipe["value"]]
    return found


def of_codec(settings: dict[str, Any]) -> Output:
    """What is kept of fixed keys, and what they are decoded to."""
    draw = torch.Generator().manual_seed(0)
    # Eighths up to 16, a channel that stands out, and a token of zeros: sums of them are exact.
    x_BHTD = torch.randint(-128, 129, (1, 2, N_TOKENS, DIM), generator=draw) / 8
    x_BHTD[..., 5] += 64
    x_BHTD[:, :, 7] = 0
    codec = instantiate(settings)
    packed = codec.encode(x_BHTD)
    return output([*packed.tensors.values(), codec.decode(packed)])


def output(tensors: Iterable[Any]) -> Output:
    """Codes to the bit; of other tensors a sum that depends on each value and its place."""
    sha, numbers = hashlib.sha256(), []
    for tensor in map(torch.as_tensor, tensors):
        if tensor.is_floating_point():
            values = tensor.double().flatten()
            places = torch.arange(1, len(values) + 1, dtype=torch.float64).sqrt().frac()
            numbers += [float(values @ places), float(values.abs().sum())]
        else:
            sha.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return {"bits": sha.hexdigest()[:16], "numbers": numbers}


@cache
def reading() -> tuple[Any, Any, torch.Tensor, torch.Tensor, str]:
    """The embedded model and its tokenizer, a generated document cut at a pool's end, and its text."""
    model, tokenizer = polykv.load_model("reference", device="cpu")
    document = generated.generate_document(tokenizer, 160, seed=0)
    ids_BT = torch.tensor([tokenizer(document.text, add_special_tokens=False).input_ids])
    return model, tokenizer, ids_BT[:, :112], ids_BT[:, 112:], document.text


def of_cascade() -> Output:
    model, _, prefix_BT, rest_BT, _ = reading()
    cache = polykv.pool.prefill(model, prefix_BT)
    pool = polykv.SharedKVPool.from_cache(cache, polykv.load_recipe("polykv"), backend="torch")
    with torch.no_grad(), polykv.attend_in_place(model):
        logits = model(input_ids=rest_BT, past_key_values=pool.reader(1)).logits
    return output([logits[0, :, ::50]])


def of_continuation() -> Output:
    draw = torch.Generator().manual_seed(0)
    full, other = torch.randn(2, 9, 12, generator=draw).log_softmax(-1)
    found = continuation.compare(full, other, torch.arange(10)[None])
    return output([found.nll_full, found.nll, found.kl, found.delta_p])


def of_online() -> Output:
    model, _, prefix_BT, rest_BT, _ = reading()
    document = Document("generated", torch.cat([prefix_BT, rest_BT], 1), prefix_BT.shape[1], ())
    scored_TV, _ = online.score(model, document, polykv.load_recipe("polykv"), 64)
    return output([scored_TV[:, ::50]])


def of_metric(metric: ModuleType) -> Output:
    draw = torch.Generator().manual_seed(0)
    full, other = torch.randn(2, 9, 12, generator=draw).log_softmax(-1)
    return output([metric.of(full, other, torch.arange(9)[:, None])])


def of_statistics() -> Output:
    samples = [np.array([0.1, 0.5, 0.2]) * number**2 for number in range(1, 10)]
    numbers = [*statistics.document_interval(samples), *statistics.wilson(3, 17)]
    numbers += statistics.mcnemar([True] * 9 + [False], [False] * 5 + [True] * 5)
    return output([torch.tensor(numbers, dtype=torch.float64)])


def of_answers() -> Output:
    pairs = [("It is 1,851 km.", "1851"), ("the Saturn V", "Saturn V"), ("11", "1"), ("A", "a")]
    return output([torch.tensor([answers.contains(*pair) for pair in pairs])])


def of_retrieval() -> Output:
    model, tokenizer, prefix_BT, _, _ = reading()
    cache = polykv.pool.prefill(model, prefix_BT)
    cache.batch_repeat_interleave(2)
    texts = [[" Q: Who is the pilot?", " A: a red hen."], [" The pilot is", " a"]]
    questions, said = ([encode(tokenizer, text)[0] for text in of] for of in texts)
    found = retrieval.log_probs(model, cache, questions, [said, said[:1]])
    return output([found[0], found[1]])


def of_keep(settings: dict[str, Any]) -> Output:
    draw = torch.Generator().manual_seed(0)
    k_BHTD, queries = (torch.randn(1, n, N_TOKENS * 2, DIM, generator=draw) for n in (2, 4))
    return output([instantiate(settings).places(k_BHTD, LayerContext(queries=queries))])


def of_text(text: str) -> Output:
    return {"bits": hashlib.sha256(text.encode()).hexdigest()[:16], "numbers": []}


def of_placed() -> Output:
    _, tokenizer, _, _, _ = reading()
    return of_text(str(placed(tokenizer, Random(0), ["One pilot.", "Two hens."], 200, "")))


def of_task(name: str) -> Output:
    cfg = load_group("document", name)
    return of_text(str(get_class(cfg._target_).from_config(cfg).write(Random(0), 15)))


def tasks() -> list[tuple[str, type[Task]]]:
    """The documents that are tasks, each with its class."""
    found = (
        (name, load_group("document", name).get("_target_", "")) for name in available("document")
    )
    ours = ((name, target) for name, target in found if target.startswith("polykv.tasks."))
    return [(name, get_class(target)) for name, target in ours]


def of_gsm8k() -> Output:
    texts = ["#### 18", "so $1,080.50", "#### -5 and 7", "none", "12 #### 3/4"]
    said = [[str(gsm8k.extract(text, how)) for text in texts] for how in ("strict", "flexible")]
    return {"bits": hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16], "numbers": []}


def of_layers() -> Output:
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 4, 3, 8, generator=draw)
    k, v, k_other, v_other = torch.randn(4, 1, 2, 11, 8, generator=draw)
    return output(layers.head_errors(queries, (k, v), (k_other, v_other)).values())


def of_decode_drift() -> Output:
    model, _, prefix_BT, rest_BT, _ = reading()
    reply = decode_drift.reply_of(model, prefix_BT[0], rest_BT[0, :24])
    found = decode_drift.log_probs(model, reply, polykv.load_recipe("waterfill_4"), page=8)
    return output([found[:, ::50]])


def of_allocate() -> Output:
    weights = np.arange(1, 41)[::-1] / 7
    return output([allocate.allocate(weights, (3.0, 4.0, 8.0, 16.0), (1, 0.2, 0.01, 0), 200.0)])


def of_cards() -> Output:
    model, tokenizer, prefix_BT, _, _ = reading()
    cache = polykv.pool.prefill(model, prefix_BT)
    card = polykv.CacheCard.seal(
        cache, prefix_BT[0], model, tokenizer, policy="local", budget_bits=4.5
    )
    injected = card.dequantize()
    return output([tensor for layer in injected.layers for tensor in (layer.keys, layer.values)])


def of_signals() -> Output:
    model, _, prefix_BT, _, _ = reading()
    cache = polykv.pool.prefill(model, prefix_BT)
    sender = signals.Sender(model, cache, prefix_BT[0], signals.Topology(n_shared=40), seed=0)
    known = {**signals.IMPORTANCE, **signals.DEMAND}
    return output([signals.combined((name,), known, sender) for name in sorted(known)])


def of_generated() -> Output:
    return of_text(reading()[4])


PARTS: dict[Any, Callable[[], Output]] = {
    cascade: of_cascade,
    continuation: of_continuation,
    online: of_online,
    statistics: of_statistics,
    answers: of_answers,
    gsm8k: of_gsm8k,
    retrieval: of_retrieval,
    layers: of_layers,
    decode_drift: of_decode_drift,
    allocate: of_allocate,
    mixed: of_cards,
    signals: of_signals,
    generated: of_generated,
    **{metric: partial(of_metric, metric) for metric in METRICS.values()},
}


def names() -> dict[str, tuple[int, str, Callable[[], Output]]]:
    """Name -> version, where it is declared, and what makes the output."""
    found = {}
    for settings in settings_of_codecs():
        cls = get_class(settings["_target_"])
        place = f"{cls.__module__}.{cls.__name__}.version"
        name = json.dumps(settings, sort_keys=True)
        found[name] = (cls.version, place, lambda settings=settings: of_codec(settings))
    for settings in filter(
        None, (load_group("recipe", name).get("keep") for name in available("recipe"))
    ):
        settings = OmegaConf.to_container(settings)
        cls = get_class(settings["_target_"])
        place = f"{cls.__module__}.{cls.__name__}.version"
        found[json.dumps(settings, sort_keys=True)] = (
            cls.version,
            place,
            partial(of_keep, settings),
        )
    for module, made in PARTS.items():
        found[module.__name__] = (module.VERSION, f"{module.__name__}.VERSION", made)
    found["placed"] = (Task.version, "polykv.tasks.base.Task.version", of_placed)
    for name, cls in tasks():
        place = f"{cls.__module__}.{cls.__name__}.version"
        found[f"task {name}"] = (cls.version, place, partial(of_task, name))
    return found


def same(one: Output, other: Output) -> bool:
    """Whether two outputs are the same but for rounding."""
    a, b = one["numbers"], other["numbers"]
    near = (
        math.isclose(x, y, rel_tol=RELATIVE, abs_tol=RELATIVE) for x, y in zip(a, b, strict=False)
    )
    return one["bits"] == other["bits"] and len(a) == len(b) and all(near)


def complaint(version: int, place: str, found: Output, kept: Output | None) -> str | None:
    """What is wrong with a new output beside the committed one, if anything is."""
    if kept is None or (version != kept["version"]):
        return "outputs.json does not know it yet: run python tests/outputs.py"
    if same(found, kept):
        return None
    return (
        f"it makes other numbers than before: raise {place} from {version} to {version + 1}, "
        "then run python tests/outputs.py"
    )


def main() -> int:
    """Write outputs.json; outputs that changed under an unchanged version are refused. The exit code."""
    kept = json.loads(PLACE.read_text()) if PLACE.is_file() else {}
    new, refused = {}, 0
    for name, (version, place, make) in names().items():
        found = {"version": version, **make()}
        new[name], old = found, kept.get(name)
        if old and old["version"] == version:
            new[name] = old
            if said := complaint(version, place, found, old):
                print(f"{name}: {said}", file=sys.stderr)
                refused = 1
    PLACE.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")
    return refused


if __name__ == "__main__":
    sys.exit(main())
