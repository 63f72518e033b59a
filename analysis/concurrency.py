"""Table and figure of `concurrency`: memory and speed of N agents that decode together, by reader."""

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from analysis import published, style
from analysis.load import swept
from analysis.points import RUN, over_seeds, parts, run_text, settings_text
from analysis.published import SAME_LENGTH
from analysis.render import Column, Row, Table, describe, fixed, keys, settings_columns
from analysis.statistics import BYTES, Measure, Value, median

STEP = Measure("step_time", reduce=median)
MB_PER_GB, MS_PER_S = 1e3, 1e3


class Who(NamedTuple):
    """Who reads the prefix, and what computes it."""

    reader: str
    backend: str


Lines = dict[Who, dict[int, dict[str, Value]]]  # by number of agents, by measure


def table(rows: pd.DataFrame) -> Table:
    """Memory, time of a step and throughput, by number of agents and reader."""
    lines = []
    for title, mine in runs(rows):
        for line, of_agents in parts(mine, ["n_agents", *swept(mine)], sort=True):
            found = {who: measures(part) for who, part in _by_reader(of_agents)}
            unshared = next((m for who, m in found.items() if who.reader == "unshared"), {})
            line |= {"section": title, "agents": str(line["n_agents"])}
            for who, measured in found.items():
                about = line | {"reader": style.READERS[who.reader][0], "backend": who.backend}
                lines.append(about | measured | _against(unshared, measured))

    def speed(number: float, row: Row) -> str:
        return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"

    columns = [
        *keys("agents", "reader"),
        *settings_columns(rows),
        Column("resident", "resident, MB", fixed(1)),
        Column("smaller", "× less", fixed(1)),
        Column("step", "ms per step [quartiles]", fixed(1), interval=True),
        Column("faster", "× faster", fixed(2)),
        Column("throughput", "tokens/s [quartiles]", speed, interval=True),
        Column("stored", "prefix stored, MB", fixed(2)),
        Column("per_agent", "resident per agent, MB", fixed(2)),
        Column("backend", "backend"),
    ]
    explained = (
        "Unshared caches and dequantize: a full-precision copy each, in one padded batch, as transformers runs it: "
        "sdpa, and a DynamicCache, which copies a layer to append to it. In place: all attend to the compressed pool. "
        "Resident: measured peak above the loaded model, in a fresh process; stored: bytes of the tensors kept of the "
        "prefix; a step gives every agent a token"
    )
    caption = f"Agents that decode together after one prefix. {_published(rows)}{described(rows)}"
    return Table("concurrency", caption, columns, lines, explained)


@style.styled
def figure(rows: pd.DataFrame) -> style.Picture:
    """Memory and throughput against the number of agents, log-log; one line of panels per run."""
    found = {}
    for title, mine in runs(rows):
        for setting, part in parts(mine, swept(mine), sort=True):
            found[title.replace("; ", "\n") + settings_text(setting)] = part
    canvas, panels = style.sheet(list(found), 2, 1.9)
    for (resident, speed), mine in zip(panels, found.values(), strict=True):
        lines = {
            who: {int(n): measures(of) for n, of in part.groupby("n_agents")}
            for who, part in _by_reader(mine)
        }
        lined = any(len(by_agents) > 1 for by_agents in lines.values())
        if lined:
            _panel(resident, lines, "stored", linestyle="--")
        _panel(resident, lines, "resident", named=True)
        _panel(speed, lines, "throughput", named=True)
        for ax, label in ((resident, "KV memory, MB"), (speed, "tokens/s, all agents")):
            ax.set_xscale("log")
            style.plain_log(ax)
            ax.margins(x=0.06, y=0.1)
            style.number_ticks(ax, set().union(*lines.values()))
            ax.set_xlabel("agents")
            ax.set_ylabel(label)
        resident.set_title("resident" + "; dashed: stored of the prefix" * lined)
    return style.picture(
        style.legend(canvas),
        "Memory and throughput of N agents that decode together after one prefix, by reader; resident is the measured "
        "peak above the loaded model",
        described(rows),
        style.Marks(bars="quartiles of decode steps", dashed="bytes stored of the prefix"),
    )


def measures(rows: pd.DataFrame) -> dict[str, Value]:
    """What one reader and number of agents take: memory in MB, a step in ms, and tokens per second of all agents."""
    n_agents = int(rows["n_agents"].iloc[0])
    found = {
        name: over_seeds(rows, BYTES[name].of).map(lambda gb: MB_PER_GB * gb)
        for name in ("stored", "resident")
    }
    step = over_seeds(rows, STEP.of)
    return found | {
        "per_agent": found["resident"].map(lambda mb: mb / n_agents),
        "step": step,
        "throughput": step.map(lambda ms: MS_PER_S * n_agents / ms),
    }


def _panel(ax: Axes, lines: Lines, measure: str, linestyle: str = "-", named: bool = False) -> None:
    """Draw a line of `measure` per reader, `named` in the legend; dequantize, nearly as unshared, is drawn thinner."""
    for who, by_agents in lines.items():
        tint = style.SKY if who == Who("in_place", "torch") else style.READERS[who.reader][1]
        thin = 0.7 if who.reader == "dequantize" else 1.0
        look = {"color": tint, "linewidth": 1.6 * thin, "markersize": 4.5 * thin}
        look |= {"marker": "o" if named else "", "linestyle": linestyle}
        alone = sum(other.reader == who.reader for other in lines) == 1
        name = style.READERS[who.reader][0] + ("" if alone else f", {who.backend}")
        spots = ((n, found[measure]) for n, found in by_agents.items())
        style.series(ax, spots, label=name if named else "", **look)


def runs(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(title, rows) of each group of rows that are compared with each other."""
    # A cell's timed rows have its number of threads; its other rows get it too.
    rows = rows.assign(n_threads=rows.groupby("cell")["n_threads"].transform("max"))
    about = [*RUN, "synthetic", "context_tokens", "recipe", "n_threads"]
    for run, part in parts(rows, about, sort=True):
        prefix, n = "synthetic cache" if run["synthetic"] else "random tokens", run["n_threads"]
        threads = "not timed" if n is None else f"{n} CPU thread{'s' * (n > 1)}"
        title = f"{run_text(run)}, {run['context_tokens']:,} tokens ({prefix}), {run['recipe']}"
        yield f"{title}; {threads}", part


def _by_reader(rows: pd.DataFrame) -> Iterator[tuple[Who, pd.DataFrame]]:
    found = rows.groupby(["reader", "backend"])
    for key in sorted(found.groups, key=lambda key: ([*style.READERS].index(key[0]), key[1])):
        yield Who(*key), found.get_group(key)


def _against(unshared: dict[str, Value], measured: dict[str, Value]) -> Row:
    """Memory and step time relative to unshared caches in the same cell."""
    line = {}
    for name, measure in (("smaller", "resident"), ("faster", "step")):
        base, own = unshared.get(measure, Value(None)), measured[measure]
        known = base.value is not None and own.value
        why = "unshared caches or this reader were not measured"
        line[name] = Value(base.value / own.value) if known else Value(None, note=why)
    return line


def described(rows: pd.DataFrame) -> str:
    """`render.describe` with the number of timed steps per reader as n."""
    steps = rows[rows["metric"] == "step_time"]
    n = steps.groupby(["cell", "reader", "backend"])["sample"].transform("count").astype("Int64")
    return describe(rows.assign(n=n))


def _published(rows: pd.DataFrame) -> str:
    """The published GB for the same model, agents and length as these rows, as a sentence."""
    measured = rows[["model", "n_agents", "context_tokens"]].drop_duplicates()
    texts = [
        f"{f.value.value:.3f} GB ({f.policy}, {f.n_agents} agents, {f.prefilled_tokens:,} tokens)"
        for f in published.load("polykv")
        if f.metric == "kv_memory"
        and any(
            published.same_model(f.model, model)
            and n_agents == f.n_agents
            and abs(tokens / f.prefilled_tokens - 1) <= SAME_LENGTH
            for model, n_agents, tokens in measured.itertuples(index=False)
        )
    ]
    return f"Published, computed at fp32: {', '.join(texts)}. " if texts else ""


TABLES = {"concurrency": table}
FIGURES = {"concurrency": figure}
