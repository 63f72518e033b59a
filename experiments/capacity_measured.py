"""Measurements of study `concurrency`, quoted by `capacity` beside the formulas' values for the same agents."""

import hashlib
from dataclasses import replace
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from experiments import settings
from polykv.errors import PolyKVError
from polykv.evaluation.capacity import TOLERANCE, WORKSPACE, Architecture, DecodeWorkload
from polykv.evaluation.hardware import Replica
from polykv.evaluation.memory import GB
from polykv.recipe import Recipe
from polykv.results import Rows, load_rows

QUOTED = "concurrency"
# Columns of its rows that are quoted (experiments/concurrency.py).
COLUMNS = {"accounting": str, "n_tokens": int, "synthetic": bool, "n_threads": int}
# Columns that distinguish its lines; of cells that agree in all, the newest is quoted.
LINE = [
    "weights", "device", "dtype", "context_tokens", "n_tokens", "synthetic", "n_agents", "reader", "backend", "seed",
]  # fmt: skip


def check(cfg: DictConfig) -> None:
    """Check that the folder to quote from, if one is set, has rows to quote."""
    if cfg.measured is not None and _measured(cfg).empty:
        raise PolyKVError(
            f"measured={cfg.measured} has no rows of experiment={QUOTED}; give a results folder "
            "that has, or leave it out"
        )


def digest(cfg: DictConfig) -> str:
    """A digest of the rows to quote, which is part of a cell's identity."""
    return hashlib.sha256(_measured(cfg).to_csv(index=False).encode()).hexdigest()[:12]


def add_rows(rows: Rows, cfg: DictConfig, model: Architecture, replica: Replica) -> None:
    """Rows of kv_memory of this model and recipe, measured and computed, and the difference that is allowed.

    Also the measured step times, and the bytes that a step reads by the formulas (`step_read`). Measurements of models
    with quantized weights are left out, since the formulas do not cover them.
    """
    found = _measured(cfg)
    if found.empty:
        return
    for group in ("model", "recipe"):
        found = found[found[group] == settings.label(cfg, group)]
    found = found[(found["quantization"] == "") & found["value"].notna()]
    found = found.sort_values(["created_at", "cell"], kind="stable")
    recipe = Recipe.from_config(cfg.recipe)
    for _, part in found.groupby(LINE, dropna=False, sort=False):
        newest = part[part["cell"] == part["cell"].iloc[-1]]
        one = newest.iloc[0]
        as_measured = replace(model, dtype=one["dtype"])
        n_prefix, n_suffix = int(one["n_tokens"]), int(one["context_tokens"] - one["n_tokens"])
        workload = DecodeWorkload.of(as_measured, replica, recipe, n_prefix, n_suffix)
        for row in newest.to_dict("records"):
            quote = _about(row) | {"source": "measured"}
            quote["note"] = f"measured at commit {row['commit']} on {row['created_at']}"
            if row["metric"] == "kv_memory":
                rows.add("kv_memory", row["value"], "GB", **quote)
                _add_computed(rows, row, workload)
            elif row["metric"] == "step_time":
                rows.add("step_time", row["value"], "ms", sample=int(row["sample"]), n=1, **quote)
        if (newest["metric"] == "step_time").any():
            read = sum(workload.read_bytes(one["reader"], int(one["n_agents"])))
            about = _about(one.to_dict()) | {"accounting": None, "source": "computed"}
            rows.add("step_read", read / GB, "GB", **about)


def _add_computed(rows: Rows, row: dict[str, Any], workload: DecodeWorkload) -> None:
    """Rows of the bytes by the formula, and of how many more may be measured: none of stored bytes."""
    stored = row["accounting"] == "stored"
    compute = workload.prefix_bytes if stored else workload.cache_bytes
    allowed = 0 if stored else round(TOLERANCE * round(row["value"] * GB)) + WORKSPACE
    about = _about(row) | {"source": "computed"}
    rows.add("kv_memory", compute(row["reader"], int(row["n_agents"])) / GB, "GB", **about)
    rows.add("kv_memory_allowed", allowed / GB, "GB", **about)


def _about(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a quoted row, as plain values."""
    about = {name: row[name] for name in ("weights", "device", "dtype", "reader", "backend")}
    about |= {"accounting": row["accounting"] or None, "synthetic": bool(row["synthetic"])}
    whole = ("n_agents", "context_tokens", "n_tokens", "n_threads", "seed")
    return about | {name: None if pd.isna(row[name]) else int(row[name]) for name in whole}


def _measured(cfg: DictConfig) -> pd.DataFrame:
    """The rows of `concurrency` in the folder `measured`, else in this sweep's own, sorted by cell."""
    rows, damaged = load_rows(cfg.results_dir if cfg.measured is None else cfg.measured, QUOTED)
    if damaged:
        raise PolyKVError(
            f"damaged: {damaged[0]}; measure it again (experiment={QUOTED}), or remove it"
        )
    return rows.sort_values("cell", kind="stable") if len(rows) else rows
