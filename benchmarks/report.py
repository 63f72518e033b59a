"""A benchmark's lines as a table on the screen and as a tidy CSV (the columns of polykv.results and a few more)."""

import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from polykv.results import Rows, provenance

OUT = Path(__file__).resolve().parents[1] / "results" / "local" / "benchmarks"


class Report:
    """Collects observations; `shared` are columns of polykv.results, `extra` further ones."""

    def __init__(self, name: str, extra: dict[str, Any], **shared: Any) -> None:
        origin = provenance()
        stamp = {key: origin[key] for key in ("commit", "created_at")}
        self.name = name
        self._rows = Rows(study=f"benchmark_{name}", device="cpu", **stamp, **shared)
        self._extra = {**extra, "machine": processor(), "torch": torch.__version__}
        self._extras: list[dict[str, Any]] = []

    def add(
        self, system: str, metric: str, value: float | None, unit: str,
        quartiles: tuple[float, float] | None = None, **columns: Any,
    ) -> None:  # fmt: skip
        """One observation; `quartiles` are the 25th and 75th percentile of what `value` is the median of."""
        self._rows.add(metric, value, unit, **columns)
        low, high = quartiles or (None, None)
        self._extras.append({"system": system, "q1": low, "q3": high, **self._extra})

    def write(self, path: Path | None) -> Path:
        path = path or OUT / f"{self.name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame = pd.concat([pd.DataFrame(self._rows), pd.DataFrame(self._extras)], axis=1)
        frame.to_csv(path, index=False)
        return path


def begun(path: Path, shared: dict[str, Any]) -> pd.DataFrame:
    """The rows of a CSV that a run with these values in all rows began; none if there is no file.

    Makes its folder. Ends the program if the rows are of another run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return pd.DataFrame()
    rows = pd.read_csv(path, dtype={"model": str, "text": str})  # a digest may have digits only
    if len(rows) and not (rows[list(shared)] == pd.Series(shared)).all(axis=None):
        raise SystemExit(f"{path} has rows of another run; give another --csv")
    return rows


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(title: str, columns: list[str], lines: list[list[str]], notes: list[str]) -> None:
    """The first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        first = column == columns[0]
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    for line in lines:
        table.add_row(*line)
    console = Console(width=max(Console().width, 150), highlight=False)
    console.print(table)
    for note in notes:
        console.print(note, style="dim")
    console.print()
