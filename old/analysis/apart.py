"""Cells that would fall on one line of a table are told apart by the settings that differ. Pure.

Without it a sweep over a setting that has no column (max_new_tokens=16,32) would end in one line, of the cell that ran
last. The settings join the label that they belong to: `reference (max_new_tokens=16)`. A cell that was measured anew
under the same settings still replaces the older one (analysis/reduce.py).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from polykv.naming import UNSET, flat, mark, text
from polykv.results import NOT_IDENTITY

# What a line of any table is about; rows that agree in all of it are on one line.
LINE = ["model", "weights", "dtype", "device", "document", "context_tokens", "n_agents", "n_hops", "recipe",
        "policy", "budget_bits", "reader", "backend", "metric", "protocol", "seed"]  # fmt: skip
TOGETHER = ("quickstart", "polykv_memory", "polykv_quality", "polykv_ratio")  # in the same tables
# Whose label a group of settings joins. Any other setting joins the model's, by which every table has its lines.
COLUMN = {"model": "model", "document": "document", "relay": "document", "recipe": "recipe", "policy": "policy",
          "hardware": "device"}  # fmt: skip
# Settings that a column tells already, and those that say what else a cell measured or quoted.
TOLD = {*NOT_IDENTITY, "experiment_name", "labels", "weights", "context", "n_agents", "n_hops", "budget_bits",
        "seed", "reader", "backend", "device", "reseal", "scorer", "model.weights", "model.dtype",
        "model.quantization", "document.n_documents", "agents", "readers", "suffix_tokens", "transports",
        "measured", "measured_digest", "state", "versions"}  # fmt: skip

Cell = tuple[str, str]  # experiment and cell
Configs = Mapping[Cell, Mapping[str, Any]]
Settings = dict[str, Any]


class Subject(NamedTuple):
    """Whose settings tell cells apart: in one kind of tables those of, say, the recipe of this name."""

    table: str
    group: str
    name: str | None


def told_apart(rows: pd.DataFrame, configs: Configs) -> pd.DataFrame:
    """The rows, with what their cells' settings differ in added to their labels, where cells share a line."""
    table = rows["experiment"].where(~rows["experiment"].isin(TOGETHER), TOGETHER[0])
    cells = pd.Series([*zip(rows["experiment"], rows["cell"], strict=True)], rows.index)
    settings = {cell: _settings(configs[cell]) for cell in cells.unique()}
    placed = rows.assign(_table=table, _cell=cells)
    on_line = placed.groupby(["_table", *LINE], dropna=False)["_cell"].agg(frozenset)
    together = {(place, on) for (place, *_), on in on_line.items() if len(on) > 1}
    differing: dict[Subject, set[str]] = {}
    for place, on in together:
        for key in _differing([settings[cell] for cell in on]):
            for subject in {_subject(place, key, settings[cell]) for cell in on}:
                differing.setdefault(subject, set()).add(key)
    said = _said(differing, dict(zip(cells, table, strict=True)), settings)
    for column in dict.fromkeys([*COLUMN.values(), "model"]):
        words = cells.map(lambda cell, column=column: said.get((cell, column), ""))
        # A row that leaves the column empty says it of the model.
        for label in dict.fromkeys((column, "model")):
            here = (words != "") & (rows[label] != "")
            rows = joined(rows, label, words.where(here, ""))
            words = words.mask(here, "")
    return rows


def told_by(rows: pd.DataFrame, line: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """The rows, with these columns added to the model's label where rows of one line differ in them."""
    words = pd.Series("", rows.index)
    for column in columns:
        said = rows[column].map(lambda value: f"{value:g}" if isinstance(value, float) else value)
        if rows.assign(_said=said).groupby([*line], dropna=False)["_said"].nunique().max() > 1:
            words += words.where(words == "", ", ") + f"{column}=" + said.replace("", UNSET)
    return joined(rows, "model", words)


def joined(rows: pd.DataFrame, label: str, words: pd.Series) -> pd.DataFrame:
    """Rows whose label says these words too, in brackets; "" says nothing."""
    told = rows[label] + " (" + words + ")"
    return rows.assign(**{label: rows[label].where(words == "", told)})


def without_settings(label: str) -> str:
    """A label without what `joined` added."""
    return label.partition(" (")[0]


def _settings(config: Mapping[str, Any]) -> Settings:
    found = flat(config)
    return {k: v for k, v in found.items() if k not in TOLD and k.partition(".")[0] not in TOLD}


def _differing(cells: Sequence[Settings]) -> set[str]:
    """The settings that differ among cells of one line.

    Cells that name several recipes share only lines that depend on none: nothing of a recipe counts there.
    """
    found: dict[str, set[str]] = {}  # by group
    for key in dict.fromkeys(key for one in cells for key in one):
        group, _, rest = key.partition(".")
        values = {_value(key, one) for one in cells}
        if group == "policies":  # of which a cell times those that it likes
            values -= {UNSET}
        names = {one.get(f"{group}.name") for one in cells}
        if len(values) > 1 and len(names) == 1 and rest != "name":
            found.setdefault(group, set()).add(key)
    # A digest tells what nothing else does: that a file was rewritten.
    return {
        key
        for keys in found.values()
        for key in {key for key in keys if not key.endswith("digest")} or keys
    }


def _value(key: str, one: Settings) -> str:
    """A setting as it is compared: where its digest is known, a path is its end."""
    if key not in one:
        return UNSET
    known = f"{key.partition('.')[0]}.digest" in one
    return text(one[key]) if known and key.endswith(".path") else json.dumps(one[key])


def _subject(table: str, key: str, one: Settings) -> Subject:
    group = key.partition(".")[0]
    group = group if group in COLUMN else "model"
    return Subject(table, group, one.get(f"{group}.name"))


def _said(
    differing: Mapping[Subject, set[str]],
    tables: Mapping[Cell, str],
    settings: Mapping[Cell, Settings],
) -> dict[tuple[Cell, str], str]:
    """(cell, column) -> what its label has to say: every cell of a subject says how it stands."""
    found: dict[tuple[Cell, str], list[str]] = {}
    for subject, keys in differing.items():
        cells = [cell for cell, table in tables.items() if table == subject.table]
        cells = [c for c in cells if settings[c].get(f"{subject.group}.name") == subject.name]
        for key in sorted(keys):
            values = {cell: settings[cell].get(key, UNSET) for cell in cells}
            # Paths of another place may end alike.
            alike = len({text(v) for v in values.values()}) < len(
                {json.dumps(v) for v in values.values()}
            )
            for cell, value in values.items():
                name = text(key.removeprefix(f"{subject.group}."))
                word = f"{name}={mark(value) if alike else text(value)}"
                found.setdefault((cell, COLUMN[subject.group]), []).append(word)
    return {place: ", ".join(words) for place, words in found.items()}
