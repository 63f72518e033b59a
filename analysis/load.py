"""Cells on disk, or packed ones -> one typed DataFrame. The only module here that reads results."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from polykv.archive import all_cells
from polykv.cellfile import Cell
from polykv.errors import PolyKVError
from polykv.naming import flat
from polykv.results import NOT_IDENTITY, frame

SETTING = "set."  # of the columns that settings get which differ between cells of one line
# What a line of any table is about, apart from what its study adds.
LINE = (
    "study", "model", "weights", "dtype", "device", "document", "context_tokens", "n_agents", "recipe", "policy",
    "budget_bits", "reader", "backend", "metric", "seed",
)  # fmt: skip
# Settings that a column of LINE tells, as names with their overrides (polykv/naming.py) or as they are; and the
# versions of code: of cells that differ in nothing else, the newest counts.
TOLD = (
    *NOT_IDENTITY, "study", "labels", "weights", "context", "n_agents", "budget_bits", "seed", "reader", "backend",
    "device", "policy", "baselines", "transports", "readers", "relay", "hardware", "scorer", "versions",
    "suffix_tokens", "measured", "measured_digest",
)  # fmt: skip
# Of these groups a label tells all but what is listed.
UNTOLD = {
    "model": ("attn_implementation", "device_map", "threads"),
    "document": ("n_documents",),
}
PAPER, ONLINE = "paper", "online"  # protocols; cells that name none are of the paper's
Place = tuple[str, str]  # study and cell


@dataclass(frozen=True)
class Results:
    """Rows and cells of one or several results folders.

    Attributes:
        rows: polykv.results.frame, and a column `set.NAME` for each setting that differs between cells of one line.
        damaged: one line for each cell skipped.
        cells: by study and identity.
    """

    rows: pd.DataFrame
    damaged: tuple[str, ...] = ()
    cells: Mapping[Place, Cell] = field(default_factory=dict)

    @property
    def studies(self) -> dict[str, Mapping[str, Any]]:
        """The declarations of the studies that were run, by name."""
        return {cell.study["name"]: cell.study for cell in self.cells.values()}


@contextmanager
def drawing(root: Path) -> Iterator[None]:
    """Lock a results folder from reading the rows to writing the last figure.

    Processes that share a folder all draw when they end; without it an early one's table can replace a later one's.

    Raises:
        PolyKVError: the folder cannot be written.
    """
    if not root.is_dir():
        yield  # `load` says so
        return
    marker = root / ".drawing.lock"
    lock = FileLock(marker)
    try:
        lock.acquire()
    except OSError as error:
        raise PolyKVError(
            f"cannot write into {root} ({error.strerror or error}); give a folder that can be written"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # the folder became read-only: the lock is free all the same
            marker.unlink(missing_ok=True)
        lock.release()


def load(*roots: Path) -> Results:
    """Every row of every readable cell in these folders, packed (polykv/archive.py) or in a file of its own.

    Of a cell that is in several folders the newest copy counts.

    Raises:
        PolyKVError: a folder is not there, holds not one readable row, or its packed rows are damaged.
    """
    named: dict[Place, Cell] = {}
    damaged: list[str] = []
    for root in roots:
        cells, skipped = all_cells(root)
        damaged += skipped
        if not any(next(iter(cell.rows.values()), ()) for cell in cells):
            listing = f"; damaged: {', '.join(skipped)}" if skipped else ""
            raise PolyKVError(
                f"no results in {root}{listing}; run `make run` or `python run.py` first"
            )
        for cell in cells:
            place = cell.study["name"], cell.name
            if place not in named or _made(named[place]) <= _made(cell):
                named[place] = cell
    cells = [cell for _, cell in sorted(named.items())]
    rows = with_settings(with_files(with_protocol(frame(cells)), named), named)
    return Results(rows, tuple(damaged), named)


def _made(cell: Cell) -> str:
    return cell.provenance["created_at"]


def with_protocol(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, with protocol `paper` where none is named."""
    known = rows["protocol"] if "protocol" in rows else pd.Series("", rows.index)
    return rows.assign(protocol=known.replace("", PAPER))


def with_files(rows: pd.DataFrame, cells: Mapping[Place, Cell]) -> pd.DataFrame:
    """The rows, with the digest added to the name of a document or relay that several files have had.

    A file that was rewritten between two cells holds other texts or problems, which are not to be paired.
    """
    found = {place: dict(_files(cell.config)) for place, cell in cells.items()}
    digests = defaultdict(set)
    for files in found.values():
        for name, digest in files.items():
            digests[name].add(digest)
    several = {name for name, known in digests.items() if len(known) > 1}
    if not several:
        return rows

    def named(study: str, cell: str, name: str) -> str:
        return f"{name}@{found[study, cell][name]}" if name in found[study, cell] else name

    ambiguous = rows["document"].isin(several)
    places = rows.loc[ambiguous, ["study", "cell", "document"]]
    renamed = [named(*place) for place in places.itertuples(index=False, name=None)]
    return rows.assign(
        document=rows["document"].mask(ambiguous, pd.Series(renamed, places.index, dtype=object))
    )


def _files(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name in rows, digests of its files) of a cell's document and relay."""
    for group in ("document", "relay"):
        chosen = config.get(group) or {}
        digests = [chosen[key][:6] for key in ("digest", "questions_digest") if chosen.get(key)]
        if digests:
            name = (config.get("labels") or {}).get(group, chosen.get("name", ""))
            yield name, "-".join(digests)


def of_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of protocol `paper`, which published figures are held against."""
    return rows[with_protocol(rows)["protocol"] == PAPER]


def with_settings(rows: pd.DataFrame, cells: Mapping[Place, Cell]) -> pd.DataFrame:
    """The rows with a column `set.NAME` (text) for every setting in which cells of one line differ.

    Without it a sweep over a setting that has no column (max_new_tokens=16,32) would end in one line, of the cell that
    ran last. Cells that differ in nothing are the same measured anew: there the newest counts. What is in a recipe
    counts on lines that name one: two recipes may have one name that an experiment gives (k8v4).
    """
    places = pd.Series([*zip(rows["study"], rows["cell"], strict=True)], rows.index)
    settings, told = {}, set()
    for place, cell in cells.items():
        found = _settings(cell.config)
        told |= {name for name in found if name in cell.columns}  # a column tells it: n_hops
        settings[place] = {key: value for key, value in found.items() if key not in cell.columns}
    line = [name for name in (*LINE, *sorted(told)) if name in rows]
    together = rows.assign(_place=places).groupby(line, dropna=False)["_place"].agg(frozenset)
    differing = set()
    index = together.index
    named = zip(
        together, index.get_level_values("recipe"), index.get_level_values("policy"), strict=True
    )
    for group, recipe, policy in {line for line in named if len(line[0]) > 1}:
        keys = {key for place in group for key in settings[place]}
        keys = {key for key in keys if _concerns(key, recipe, policy)}
        differing |= {
            key for key in keys if len({settings[place].get(key, "") for place in group}) > 1
        }
    added = {
        SETTING + key: places.map(lambda place, key=key: settings[place].get(key, ""))
        for key in sorted(differing)
    }
    return rows.assign(**added)


def _concerns(setting: str, recipe: str, policy: str) -> bool:
    """Whether a line depends on the setting: a recipe's needs a recipe, a policy's concerns its own lines only."""
    group, _, rest = setting.partition(".")
    if group == "policies":
        return rest.startswith(f"{policy}.")
    return group != "recipe" or recipe != ""


def swept(rows: pd.DataFrame) -> list[str]:
    """The columns added by `with_settings` in which these rows differ."""
    return [name for name in rows if name.startswith(SETTING) and rows[name].nunique() > 1]


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted name -> value as text, for the settings that have no column."""
    found = {}
    for key, value in flat(config).items():
        group, _, rest = key.partition(".")
        if group in TOLD or (group in UNTOLD and rest not in UNTOLD[group]):
            continue
        found[key] = value if isinstance(value, str) else json.dumps(value)
    return found
