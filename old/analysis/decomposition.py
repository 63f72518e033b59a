"""How the published GB come about: a short text, computed from the rows and the published figures."""

import textwrap
from collections.abc import Sequence

from analysis.published import Figure
from analysis.reduce import BASELINE, Point, having

from analysis import published
from polykv.config import load_group

WIDTH = 100


def text(points: Sequence[Point], figures: Sequence[Figure]) -> str:
    """Markdown: every published kv_memory as tokens x bytes per token x agents, or over the ratio."""
    memory = [f for f in figures if f.metric == "kv_memory"]
    lines = ["# How the published GB decompose", ""]
    for model in dict.fromkeys(f.model for f in memory):
        mine = [f for f in memory if f.model == model]
        per_token = _bytes_per_token(model)
        ratio, of = _ratio(mine, points)
        share = sorted({f.prefilled_tokens / f.document_tokens for f in mine})
        said = (
            f"{model}: {per_token:,} bytes per token (keys and values of all layers and heads, in fp32); "
            f"the pool is one such cache over "
            f"{ratio:.3f} ({of}). Only {_span(share)} of each document is prefilled and counted."
        )
        lines += [textwrap.fill(said, WIDTH), ""]
        lines += [
            "| agents | cache | computed | GB | published GB |",
            "| --: | :-- | :-- | --: | --: |",
        ]
        for f in mine:
            size = f"{f.prefilled_tokens:,} tokens x {per_token:,} B"
            gb = f.prefilled_tokens * per_token / 1e9
            if f.recipe == BASELINE:
                kind, rule, gb = "unshared", f"{f.n_agents} agents x {size}", gb * f.n_agents
            else:
                kind, rule, gb = "one pool", f"{size} / {ratio:.3f}", gb / ratio
            lines.append(f"| {f.n_agents} | {kind} | {rule} | {gb:.3f} | {f.value.value:.3f} |")
        lines += ["", *_reduction(mine, figures, per_token, ratio, points), ""]
    return "\n".join(lines)


def _bytes_per_token(model: str) -> int:
    """Keys and values of all layers and heads in fp32, 4 bytes each, from the geometry in conf/model."""
    g = load_group("model", model.removesuffix("-instruct")).geometry
    head_dim = g.hidden_size // g.num_attention_heads
    return 2 * g.num_hidden_layers * g.num_key_value_heads * head_dim * 4


def _ratio(mine: Sequence[Figure], points: Sequence[Point]) -> tuple[float, str]:
    for p in having(points, "nominal_ratio"):
        if p.recipe == "polykv":
            return p["nominal_ratio"].value, "nominal: 16 bits over the recipe's mean payload bits"
    large = max((f for f in mine if f.recipe == BASELINE), key=lambda f: f.value.value)
    pool = next(
        f
        for f in mine
        if f.recipe != BASELINE
        and (f.n_agents, f.prefilled_tokens) == (large.n_agents, large.prefilled_tokens)
    )
    return large.value.value / large.n_agents / pool.value.value, "as the published GB imply"


def _span(shares: Sequence[float]) -> str:
    low, high = f"{shares[0]:.1%}", f"{shares[-1]:.1%}"
    return low if low == high else f"{low} to {high}"


def _reduction(
    mine: Sequence[Figure],
    figures: Sequence[Figure],
    per_token: int,
    ratio: float,
    points: Sequence[Point],
) -> list[str]:
    """The published reduction: what sharing alone gives, and the same row at fp16 and as stored."""
    lines = []
    for f in figures:
        if f.metric != "memory_reduction" or f.model != mine[0].model:
            continue
        n, alone = f.n_agents, f.prefilled_tokens * per_token / 1e9
        said = (
            f"The published reduction of {f.value.value:g} % at {n} agents is 1 - 1 / ({n} x "
            f"{ratio:.3f}) = {1 - 1 / n / ratio:.1%}; sharing one uncompressed cache, without any "
            f"compression, gives {1 - 1 / n:.1%}. In fp16 the same row is {n * alone / 2:.3f} GB "
            f"unshared and {alone / 2 / ratio:.3f} GB pooled (nominal)."
        )
        answer = published.memory_answer(f, having(points, "stored"))
        if isinstance(answer, Point):
            said += f" The pool really keeps (stored, measured) {answer['stored'].value:.3f} GB."
        lines.append(textwrap.fill(said, WIDTH))
    return lines
