"""One page of findings in plain sentences: both papers' claims, then our own questions: which recipe at which bits,
where the damage is, which signals earn their bits.

Every number comes from the rows. A verdict holds for the weights that it names and for no others.
"""

import textwrap

import pandas as pd
from analysis.claims import claims
from analysis.frontier import ALPHA, FRONTIER, Comparison, compared, layers, of_experiment, settings
from analysis.verdict import p_said, with_interval

from analysis import ablation
from polykv.evaluation.statistics import MIN_DOCUMENTS

WIDTH = 100
PAPERS = {"polykv": "PolyKV", "qkvshare": "QKVShare"}
EQUAL_BITS = 0.15  # recipes within so many stored bits are compared as equal
PAIRS = (
    ("turboquant_4bit", "uniform_rotated", "4-bit TurboQuant and plain absmax with a rotation"),
    ("turboquant_3bit", "uniform_rotated_3bit", "3-bit TurboQuant and plain absmax with a rotation"),
    ("turboquant_3bit", "uniform_rotated", "3-bit TurboQuant and plain 4-bit with a rotation"),
    ("turboquant_4bit", "turboquant_prod_4bit", "4-bit TurboQuant keys without and with QJL residual"),
    ("q4_0", "q4_0_rotated", "ggml's q4_0 without and with a rotation before it"),
    ("uniform", "uniform_rotated", "4-bit absmax without and with a rotation before it"),
    ("polykv", "polykv_q8_0", "PolyKV as published and with q8_0 keys and random signs"),
)  # fmt: skip


def text(rows: pd.DataFrame) -> str:
    """Markdown."""
    parts = ["# Findings"]
    judged = claims(rows)
    for paper, name in PAPERS.items():
        parts.append(f"## {name}'s claims")
        mine = [claim for claim in judged if claim.paper == paper]
        parts += [_bullet(claim.markdown()) for claim in mine if claim.measured]
        if n_open := sum(not claim.measured for claim in mine):
            parts.append(
                f"{n_open} claims were not measured here: published_{paper} says why, figure by figure."
            )
    for found in compared(of_experiment(rows, *FRONTIER)):
        parts.append(f"## Which recipe: {found.setting}")
        parts += [_bullet(line) for line in _recipes(found)]
    found = of_experiment(rows, "layer_sensitivity")
    for setting, mine in settings(layers(found)):
        parts.append(f"## Where the damage is: {setting}")
        parts += [_bullet(line) for line in _damage(mine)]
    for where, found in ablation.compared(rows):
        parts.append(f"## Which signals earn their bits (our question): {where}")
        parts += [_bullet(line) for line in ablation.sentences(found)]
    return "\n\n".join(parts) + "\n"


def _bullet(line: str) -> str:
    return textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ")


def _recipes(found: Comparison) -> list[str]:
    front = sorted((s for s in found.standings if s.on_front), key=lambda s: s["stored_bits"].value)
    steps = ", ".join(
        f"{s.recipe} ({s['stored_bits'].value:.2f} bits, KL {s['kl_mean'].value:.3g})"
        for s in front
    )
    lines = [f"The Pareto front of stored bits and mean KL: {steps}."]
    by_name = {s.recipe: s for s in found.standings}
    for first, second, name in PAIRS:
        if first not in by_name or second not in by_name:
            continue
        a, b = by_name[first], by_name[second]
        p = found.p_values.get(frozenset((first, second)))
        apart = abs(a["stored_bits"].value - b["stored_bits"].value)
        at = "at equal bits" if apart <= EQUAL_BITS else "at different bits"
        better = a if a["kl_mean"].value < b["kl_mean"].value else b
        outcome = f"{better.recipe} is better" if p is not None and p < ALPHA else "a tie"
        if p is None:
            outcome = f"not tested, fewer than {MIN_DOCUMENTS} documents"
        pair = "; ".join(
            f"{s.recipe} {s['stored_bits'].value:.2f} bits, KL {with_interval(s['kl_mean'], '.3g')}"
            for s in (a, b)
        )
        lines.append(f"{name}, {at}: **{outcome}**{p_said(p, ' after Holm')} ({pair}).")
    mine = by_name.get("polykv")
    if mine and mine.dominated_by:
        others = ", ".join(mine.dominated_by)
        lines.append(
            f"polykv, at {mine['stored_bits'].value:.2f} bits, is significantly worse than these "
            f"that take no more: {others}."
        )
    return lines


def _damage(rows: pd.DataFrame) -> list[str]:
    whole = rows[rows["head"].isna()]
    lines = []
    for recipe, mine in whole.groupby("recipe"):
        by_metric = {
            metric: part.set_index("layer")["value"] for metric, part in mine.groupby("metric")
        }
        damage = by_metric["layer_kl_mean"]
        worst = int(damage.idxmax())
        against = [
            f"{kind}s {(by_metric[f'error_{kind}'] / by_metric[f'gaussian_error_{kind}']).max():.2f}"
            for kind in ("key", "value")
        ]
        lines.append(
            f"{recipe} hurts layer {worst} most: compressed alone it costs {damage.max():.3g} nats, "
            f"{damage.max() / damage.sum():.0%} of the layers' sum. Its error, over that on Gaussian data, is "
            f"at most {' and '.join(against)}."
        )
    metrics = whole[whole["metric"].str.startswith(("dc_share", "peak_to_rms"))]
    top = metrics.groupby("metric")["value"].max()
    lines.append(
        f"The real cache beside white noise: at most {top['dc_share_key']:.1%} of a layer's key energy and "
        f"{top['dc_share_value']:.1%} of its value energy is common offset, which an unsigned Hadamard "
        f"transform gathers in one coordinate; its largest channels are {top['peak_to_rms_key']:.1f} (keys) "
        f"and {top['peak_to_rms_value']:.1f} (values) times their head's root mean square."
    )
    return lines
