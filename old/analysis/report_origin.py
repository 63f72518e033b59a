"""Where the rows of a report come from: folders, experiments, settings, commits, machines and versions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from analysis.apart import told_apart

from analysis.load import Results, read
from analysis.render import Column, Table, keys
from polykv.naming import flat
from polykv.results import NOT_IDENTITY, Store

COPY = ["experiment", "cell"]
PLACE = [*COPY, "folder"]
RUN = ["experiment", "model", "weights", "device", "dtype"]
LISTED = 12  # values of a swept setting


@dataclass(frozen=True)
class Origin:
    """One cell: its resolved config and what produced it, empty where its file does not say."""

    experiment: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """An experiment's configs: what all its cells share, and the values of what they do not."""

    experiment: str
    n_cells: int
    same: list[tuple[str, str]]
    swept: list[tuple[str, str]]


def union(folders: Sequence[Path]) -> tuple[Results, list[Origin]]:
    """All rows of all folders, and the origin of each cell; of a cell in several, the newest copy.

    Raises:
        PolyKVError: a folder is not there, or holds not one readable row.
    """
    found = [read(folder) for folder in folders]
    rows = pd.concat(
        [results.rows.assign(folder=place) for place, results in enumerate(found)],
        ignore_index=True,
    )
    copies = rows.sort_values(["created_at", "folder"], kind="stable")
    copies = copies.drop_duplicates(COPY, keep="last")[PLACE].sort_values(COPY, kind="stable")
    rows = rows.merge(copies, on=PLACE)
    origins = [
        _origin(Store(folders[place]), experiment, cell)
        for experiment, cell, place in copies.itertuples(index=False)
    ]
    configs = {cell: config for results in found for cell, config in results.configs.items()}
    everything = Results(
        told_apart(rows.drop(columns="folder"), configs),
        tuple(dict.fromkeys(cell for results in found for cell in results.damaged)),
        sum(results.unsealed for results in found),
        configs,
    )
    return everything, origins


def _origin(store: Store, experiment: str, cell: str) -> Origin:
    """Empty where an old file names its cell otherwise than its rows do."""
    path = store.path(experiment, cell)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Origin(experiment, dict(content["config"]), dict(content["provenance"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Origin(experiment, {}, {})


def runs(rows: pd.DataFrame, measured: pd.DataFrame) -> list[tuple[str, str, str]]:
    """What was run, a line for each model and weights, that of most values first: how, on what, and the rest."""
    lines = []
    groups = sorted(rows.groupby(["model", "weights"]), key=lambda group: -len(group[1]))
    for (model, weights), mine in groups:
        how = "Measured on" if mine.index.isin(measured.index).any() else "Computed for"
        spans = {
            "text {}": _listed(sorted(set(mine["document"]) - {""})),
            "{} tokens": _span(mine["context_tokens"]),
            "{} agents": _span(mine["n_agents"]),
            "n = {}": _span(mine["n"]),
        }
        said = [
            *(form.format(span) for form, span in spans.items() if span),
            f"{_listed(sorted(set(mine['device'])))}, {_listed(sorted(set(mine['dtype'])))}",
            " to ".join(_ends(text[:10] for text in mine["created_at"] if text)),
        ]
        lines.append((how, f"{model} ({weights} weights)", "; ".join(filter(None, said))))
    return lines


def what_ran(rows: pd.DataFrame, measured: pd.DataFrame) -> Table:
    """One line for each experiment, model, weights, device and dtype; `measured`: those not computed only."""
    lines = []
    for key, mine in rows.groupby(RUN, sort=True):
        line = dict(zip(RUN, key, strict=True)) | {
            "how": "measured" if mine.index.isin(measured.index).any() else "computed",
            "cells": len(mine[COPY].drop_duplicates()),
            "values": int(mine["value"].notna().sum()),
            "context": _span(mine["context_tokens"]),
            "agents": _span(mine["n_agents"]),
            "n": _span(mine["n"]),
            "seeds": int(mine["seed"].nunique()),
            "dates": " to ".join(_ends(text[:10] for text in mine["created_at"] if text)),
        }
        lines.append(line)
    columns = [
        *keys(*RUN, "how"),
        *(Column(name, name) for name in ("cells", "values", "context", "agents", "n", "seeds")),
        Column("dates", "dates"),
    ]
    caption = (
        "What ran. Each experiment with the model, weights, device and dtype that it ran on, or was computed "
        "for. A cell is one point of a sweep; values are those that could be had; n counts what one value is "
        "over (tokens, documents, problems or repeats)."
    )
    return Table("what_ran", caption, columns, lines)


def produced_by(origins: Sequence[Origin]) -> Table:
    """One line for each commit, machine and set of versions."""
    lines: dict[tuple, list[Origin]] = {}
    packages: dict[str, None] = {}
    for origin in origins:
        versions = origin.provenance.get("versions") or {}
        packages |= dict.fromkeys(versions)
        about = [origin.provenance.get(name) for name in ("commit", "machine", "python")]
        lines.setdefault((*map(_text, about), *sorted(versions.items())), []).append(origin)
    found = []
    for (commit, machine, python, *versions), mine in sorted(lines.items(), key=str):
        dates = [_text(origin.provenance.get("created_at"))[:10] for origin in mine]
        line = {"commit": commit, "machine": machine, "python": python, "cells": len(mine)}
        line |= {name: _text(version) for name, version in versions}
        line["experiments"] = ", ".join(sorted({origin.experiment for origin in mine}))
        found.append(line | {"dates": " to ".join(_ends(date for date in dates if date))})
    columns = [
        *keys("commit", "experiments"),
        Column("cells", "cells"),
        *(Column(name, name) for name in ("dates", "machine", "python", *packages)),
    ]
    caption = (
        "Commits, machines and versions. A commit with +dirty: files of the checkout differed from it, so the "
        "code that ran is not that commit alone."
    )
    return Table("produced_by", caption, columns, found)


def settings(origins: Sequence[Origin]) -> list[Settings]:
    """The resolved configs of each experiment; where results go and how progress shows is left out."""
    by_experiment: dict[str, list[dict[str, str]]] = {}
    for origin in origins:
        if origin.config:
            kept = {k: v for k, v in origin.config.items() if k not in NOT_IDENTITY}
            said = {k: v if isinstance(v, str) else json.dumps(v) for k, v in flat(kept).items()}
            by_experiment.setdefault(origin.experiment, []).append(said)
    found = []
    for experiment, configs in sorted(by_experiment.items()):
        same, swept = [], []
        for name in sorted(dict.fromkeys(name for config in configs for name in config)):
            values = sorted({config.get(name, "not set") for config in configs}, key=_natural)
            (swept if len(values) > 1 else same).append((name, _listed(values)))
        found.append(Settings(experiment, len(configs), same, swept))
    return found


def _listed(values: list[str]) -> str:
    more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return ", ".join(values[:LISTED]) + more


def _natural(text: str) -> tuple[bool, float, str]:
    """Numbers by size, then words."""
    number = pd.to_numeric(text, errors="coerce")
    return (True, 0.0, text) if pd.isna(number) else (False, float(number), text)


def _span(numbers: pd.Series) -> str:
    """ "" where no row states one."""
    return " to ".join(f"{number:,.0f}" for number in _ends(numbers.dropna()))


def _ends(values: Any) -> list:
    """The least and the greatest, once if they are equal."""
    found = sorted(set(values))
    return list(dict.fromkeys([found[0], found[-1]])) if found else []


def _text(value: object) -> str:
    return "" if value is None else str(value)
