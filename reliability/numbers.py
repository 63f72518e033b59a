"""Numbers at the edge (the rule is in polykv/codecs/base.py): every recipe, backend and metric, one finding a kind."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import polykv
from polykv import kernels
from polykv.errors import PolyKVError
from polykv.evaluation import bertscore, continuation, gsm8k
from polykv.evaluation.continuation import Comparison
from polykv.pool import SharedKVPool
from polykv.results import Rows
from reliability.finding import Finding

SHAPE = (1, 2, 40, 64)
N_LAYERS, LAYER, TOKEN = 4, 2, 21  # the layer and token at which something is wrong
REFUSED, KEPT = "refused", "kept"
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Edge:
    """An unusual cache: one layer's keys and values, and what has to become of it (None: either)."""

    tried: str
    layer: Callable[[torch.dtype], tuple[Tensor, Tensor]]
    fate: str | None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


def run(quick: bool) -> list[Finding]:
    """Every edge under every recipe; quick: on the torch and C++ paths of fp32 caches only."""
    backends = available_backends()[: 2 if quick else 3]
    edges = [replace(e, dtypes=e.dtypes[:1]) if quick else e for e in EDGES]
    return [
        *(_pools(edge, backends) for edge in edges),
        _documents(),
        _metrics("log-probabilities of NaN and infinity, and their overflow", _perplexities()),
        _metrics("answers without words, and without problems", _answers()),
    ]


def available_backends() -> list[str]:
    """torch, and those of the kernels that can be had here."""
    found = []
    for name in kernels.BACKENDS:
        try:
            found.append(kernels.pick_backend(name, torch.device("cpu")))
        except PolyKVError:
            continue
    return found


def _gaussian(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys, values = ((torch.randn(SHAPE, generator=generator) * scale).to(dtype) for _ in "kv")
    return keys, values


def _with(value: float, side: int) -> Callable[[torch.dtype], tuple[Tensor, Tensor]]:
    def layer(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pair = _gaussian(dtype)
        pair[side][0, 1, TOKEN, 7] = value
        return pair

    return layer


def _filled(value: float) -> Callable[[torch.dtype], tuple[Tensor, Tensor]]:
    return lambda dtype: (torch.full(SHAPE, value, dtype=dtype),) * 2


def _one_token(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    keys, values = _gaussian(dtype)
    return keys[:, :, :1], values[:, :, :1]


WIDE = (torch.float32, torch.bfloat16)  # what holds more than fp16
EDGES = (
    Edge("NaN in a layer's keys", _with(NAN, 0), REFUSED),
    Edge("NaN in a layer's values", _with(NAN, 1), REFUSED),
    Edge("infinity in a layer's keys", _with(INF, 0), REFUSED),
    Edge("minus infinity in a layer's values", _with(-INF, 1), REFUSED),
    Edge("a key outlier of 300 times the rest", _with(300.0, 0), KEPT),
    Edge("a key of 90,000, beyond fp16", _with(9e4, 0), None, WIDE),
    Edge("a value of 1e30, whose norm overflows", _with(1e30, 1), None, WIDE),
    Edge("vectors of zeros", _filled(0.0), KEPT),
    Edge("constant vectors", _filled(-3.25), KEPT),
    Edge("norms and scales below fp16's normal range", lambda d: _gaussian(d, 1e-6), KEPT),
    Edge("norms and scales that vanish", lambda d: _gaussian(d, 1e-30), KEPT),
    Edge("a single token", _one_token, KEPT),
)


def _pools(edge: Edge, backends: Sequence[str]) -> Finding:
    start, words, broken, times = time.perf_counter(), {}, [], 0
    for name in polykv.available_recipes():
        recipe = polykv.load_recipe(name)
        for dtype in edge.dtypes:
            odd, usual = edge.layer(dtype), _gaussian(dtype)
            usual = tuple(x[:, :, : odd[0].shape[2]] for x in usual)
            layers = [odd if i == LAYER else usual for i in range(N_LAYERS)]
            fates = set()
            for backend in backends:
                times += 1
                fate, said = _fate(layers, recipe, backend)
                fates.add(fate)
                words.setdefault(fate, said)
            if len(fates) > 1 or (edge.fate is not None and fates != {edge.fate}):
                broken.append(f"{name} in {dtype}: {', '.join(sorted(fates))}")
    answered = "; ".join(
        f"{fate}: {said}" if said else fate for fate, said in sorted(words.items())
    )
    return Finding(
        area="numbers",
        tried=f"{edge.tried}: every recipe ({', '.join(backends)})",
        times=times,
        answered="; ".join(["BROKEN: " + b for b in broken[:3]] + [answered]),
        survived=not broken,
        seconds=time.perf_counter() - start,
    )


def _fate(
    layers: list[tuple[Tensor, Tensor]], recipe: polykv.Recipe, backend: str
) -> tuple[str, str]:
    """What became of a cache, and the words of a refusal; anything else has a name of its own."""
    try:
        pool = SharedKVPool.from_layers(layers, recipe, backend=backend)
        decoded = pool.decode_layer(LAYER)
    except PolyKVError as error:
        said = str(error)
        named = said.startswith((f"layer {LAYER}: keys: ", f"layer {LAYER}: values: "))
        return (REFUSED, said) if named and "; " in said else ("refused without a mend", said)
    except Exception as error:
        return f"{type(error).__name__}", str(error)
    return (KEPT, "") if all(x.isfinite().all() for x in decoded) else ("decoded to NaN", "")


def _documents() -> Finding:
    """An empty document is refused, one of a token answers alike in both ways of reading."""
    start, recipe = time.perf_counter(), polykv.load_recipe("polykv")
    model, tokenizer = polykv.load_model("reference")
    try:
        SharedKVPool.from_text(model, tokenizer, "", recipe)
        refused = ""
    except PolyKVError as error:
        refused = str(error)
    word = tokenizer.decode(tokenizer("The").input_ids[:1])
    pool = SharedKVPool.from_text(model, tokenizer, word, recipe)
    answers = [pool.ask(model, tokenizer, ["The key"], 4, reader) for reader in polykv.pool.READERS]
    return Finding(
        area="numbers",
        tried="a document without a token, and one of a single token",
        times=2,
        answered=f"refused: {refused}; one token: answers {'alike' if answers[0] == answers[1] else 'differ'}",
        survived=bool(refused) and pool.n_tokens == 1 and answers[0] == answers[1],
        seconds=time.perf_counter() - start,
    )


def _perplexities() -> Iterable[Rows]:
    """Every mixture of three tokens whose log-probabilities are usual, huge, infinite or NaN."""
    cases = (1.0, 900.0, INF, NAN)
    for nll in cases:
        for nll_full in cases:
            for kl in cases:
                columns = ([1.0, nll_full, 2.0], [1.1, nll, 2.0], [0.1, kl, 0.0])
                found = [Comparison(*(np.float32(c) for c in columns), np.ones(3, bool))]
                rows = Rows()
                continuation.add_rows(rows, found)
                continuation.add_document_rows(rows, found)
                yield rows


def _answers() -> Iterable[Rows]:
    blank = ["", " ", "\u200b"]
    for answers, references in (
        ([], []),
        ([[]], [[]]),
        ([blank], [blank]),
        ([blank], [blank[::-1]]),
    ):
        rows = Rows()
        bertscore.add_rows(rows, answers, references, bertscore.resolve("auto"))
        yield rows
    for texts in ([], ["", "no number"]):
        rows = Rows()
        gsm8k.add_rows(rows, texts, ["1"] * len(texts), "reliability")
        yield rows


def _metrics(tried: str, cases: Iterable[Rows]) -> Finding:
    start, n_rows, n_missing, broken = time.perf_counter(), 0, 0, []
    for rows in cases:
        for row in rows:
            numbers = [row[column] for column in ("value", "ci_low", "ci_high")]
            n_rows += 1
            n_missing += row["value"] is None
            if not all(x is None or math.isfinite(x) for x in numbers) or (
                row["value"] is None and not row["note"]
            ):
                broken.append(f"{row['metric']} = {numbers}")
    return Finding(
        area="numbers",
        tried=tried,
        times=n_rows,
        answered=f"{n_missing} rows missing, each with its reason; {len(broken)} NaN or infinite {broken[:1] or ''}",
        survived=not broken,
        seconds=time.perf_counter() - start,
    )
