"""What `experiment=concurrency` measured, beside what the formulas of `capacity` give for the same agents."""

import hashlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from experiments import common
from polykv.errors import PolyKVError
from polykv.evaluation.capacity import TOLERANCE, WORKSPACE, Architecture, Crowd
from polykv.evaluation.hardware import Replica
from polykv.evaluation.memory import GB
from polykv.recipe import Recipe
from polykv.results import COLUMNS, Rows, load_rows

EXPERIMENT = "concurrency"
PREFIX = r"prefix of (\d+) tokens"  # in the notes of its rows, which have no column for it


def check(cfg: DictConfig) -> None:
    """Refuse a folder to quote from that holds nothing to quote.

    Raises:
        PolyKVError: names the folder.
    """
    if cfg.measured is not None and _measured(cfg).empty:
        raise PolyKVError(
            f"measured={cfg.measured} holds no rows of experiment={EXPERIMENT}; give a results folder "
            "that does, or leave it out"
        )


def digest(cfg: DictConfig) -> str:
    """What the rows to quote say, shortened: it belongs to a cell's identity."""
    return hashlib.sha256(_measured(cfg).to_csv(index=False).encode()).hexdigest()[:12]


def add_rows(rows: Rows, cfg: DictConfig, model: Architecture, replica: Replica) -> None:
    """Rows of this model and recipe as measured, as computed, and how far apart they are.

    `stored` bytes have to agree; what is `resident` may exceed the formula by TOLERANCE and WORKSPACE. A measured step
    gives the bandwidth that it would have had, had it read what the formulas count.
    """
    found = _measured(cfg)
    for group in ("model", "recipe"):
        found = found[found[group] == common.label(cfg, group)]
    # Quantized weights are not what is computed here.
    found = found[~found["dtype"].str.contains("weights", na=False)]
    prefixes = found["note"].str.extract(PREFIX, expand=False).groupby(found["cell"])
    found = found.assign(prefix=prefixes.transform("max")).dropna(subset=["value", "prefix"])
    recipe = Recipe.from_config(cfg.recipe)
    for row in found.to_dict("records"):
        n_prefix = int(row["prefix"])
        n_suffix = int(row["context_tokens"]) - n_prefix
        as_measured = replace(model, dtype=row["dtype"])
        crowd = Crowd.of(as_measured, replica, recipe, n_prefix, n_suffix)
        if row["metric"] == "kv_memory":
            _add_memory(rows, row, crowd)
        elif row["metric"] == "step_time":
            _add_bandwidth(rows, row, crowd)


def _add_memory(rows: Rows, row: dict[str, Any], crowd: Crowd) -> None:
    """The bytes measured, those computed, what may be between them, and the difference in percent of the measured."""
    protocol, measured, about = row["protocol"], round(row["value"] * GB), _about(row)
    compute, allowed = {
        "stored": (crowd.prefix_bytes, 0),
        "resident": (crowd.cache_bytes, round(TOLERANCE * measured) + WORKSPACE),
    }[protocol]
    computed = compute(row["reader"], int(row["n_agents"]))
    quoted = f"quoted, measured at commit {row['commit']} on {row['created_at']}: {row['note']}"
    rows.add(
        "kv_memory", measured / GB, "GB", **about, protocol=f"measured: {protocol}", note=quoted
    )
    about["protocol"] = f"computed: {protocol}"
    rows.add("kv_memory", computed / GB, "GB", **about, note="computed from geometry and recipe")
    note = (
        f"computed: {TOLERANCE:.0%} and {WORKSPACE >> 20} MiB, for what a step itself needs"
        if allowed
        else "the formula is exact"
    )
    rows.add("kv_memory_allowed", allowed / GB, "GB", **about, note=note)
    within = "within" if 0 <= measured - computed <= allowed else "BEYOND"
    off = 100 * (computed - measured) / measured
    rows.add("kv_memory_error", off, "%", **about, note=f"computed: {within} what is allowed")


def _add_bandwidth(rows: Rows, row: dict[str, Any], crowd: Crowd) -> None:
    read = sum(crowd.read_bytes(row["reader"], int(row["n_agents"]))) / GB
    about = _about(row) | {"protocol": "computed: from the measured step"}
    note = f"computed: {read:.4f} GB that a step reads, over the measured step"
    rows.add("implied_bandwidth", read / (row["value"] / 1e3), "GB/s", **about, note=note)


def _about(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a quoted row."""
    named = ("weights", "document", "device", "dtype", "reader", "backend")
    numbers = {name: int(row[name]) for name in ("n_agents", "context_tokens", "seed")}
    return {name: row[name] for name in named} | numbers


def _measured(cfg: DictConfig) -> pd.DataFrame:
    """The rows of `concurrency` in the folder given, else in this sweep's own: of its cells, or its rows.csv."""
    root = Path(cfg.results_dir if cfg.measured is None else cfg.measured)
    cells = sorted(root.glob(f"cells/{EXPERIMENT}/*.json"))
    files = cells or sorted(root.glob("rows.csv"))
    return _read(root, bool(cells), tuple((path, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=2)
def _read(root: Path, has_cells: bool, files: tuple[tuple[Path, int], ...]) -> pd.DataFrame:
    """Read once, however many cells quote them; `files` tell when to read again.

    Raises:
        PolyKVError: none of the cells, or not the table, can be read.
    """
    # All the same whatever they are read from: they enter the digest. No text is read for what is quoted.
    columns = [name for name in COLUMNS if name != "bos"]
    if not files:
        return pd.DataFrame(columns=columns)
    if has_cells:
        rows = load_rows(root)[0]
    else:
        try:
            rows = pd.read_csv(files[0][0]).reindex(columns=columns)
        except (ValueError, OSError) as error:  # pandas' own are ValueErrors
            first = str(error).splitlines()[0]
            raise PolyKVError(
                f"cannot read {files[0][0]} ({first}); write it again with `python -m analysis --results {root}`"
            ) from error
    return rows.loc[rows["experiment"] == EXPERIMENT, columns]
