"""Table and figure of `concurrency`: memory and speed of N agents that decode together, by reader."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only, no window

import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure as Canvas  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator  # noqa: E402

from analysis import published  # noqa: E402
from analysis.draw import label_ends  # noqa: E402
from analysis.figures import STYLE  # noqa: E402
from analysis.handoff_reduce import value  # noqa: E402
from analysis.reduce import Value, describe  # noqa: E402
from analysis.render import Column, Row, Table, fixed  # noqa: E402

EXPERIMENT = "concurrency"
READERS = ("private", "inject", "cascade")
KEYS = ["model", "weights", "device", "dtype", "document", "context_tokens", "recipe"]
MB_PER_GB = 1e3
SAME_LENGTH = 0.01  # a published pool within this relative length is that of the rows
# What a line holds: metric, protocol.
MEASURES = {
    "stored": ("kv_memory", "stored"),
    "resident": ("kv_memory", "resident"),
    "per_agent": ("kv_memory_per_agent", "resident"),
    "step": ("step_time", None),
    "throughput": ("throughput", None),
}


class Who(NamedTuple):
    """Who reads the prefix, and what computes it."""

    reader: str
    backend: str


Lines = dict[Who, dict[float, dict[str, Value]]]  # by number of agents, by measure


def concurrency(rows: pd.DataFrame) -> Table | None:
    """Memory, time of a step and throughput, by number of agents and reader."""
    lines = []
    for title, mine in _settings(rows):
        for n_agents, of_agents in mine.groupby("n_agents"):
            found = {who: _measures(part) for who, part in _by_reader(of_agents)}
            private = next((m for who, m in found.items() if who.reader == "private"), None)
            for who, measured in found.items():
                line = {"section": title, "agents": f"{n_agents:.0f}"} | who._asdict()
                lines.append(line | measured | _against(private, measured))
    columns = [
        *(Column(name, name, key=True) for name in ("agents", "reader", "backend")),
        Column("stored", "prefix stored, MB", fixed(2)),
        Column("resident", "resident, MB", fixed(2)),
        Column("per_agent", "resident per agent, MB", fixed(2)),
        Column("smaller", "× less than private", fixed(1)),
        Column("step", "ms per step [quartiles]", fixed(1), interval=True),
        Column("throughput", "tokens/s [quartiles]", _speed, interval=True),
        Column("faster", "× faster than private", fixed(2)),
    ]
    rows = rows[rows["experiment"] == EXPERIMENT]
    caption = (
        "Agents that decode together after one prefix. Private and inject: a full-precision copy each, in one "
        "padded batch, as transformers runs it: sdpa, and a DynamicCache, which copies a layer to append to it. "
        "Cascade: all attend to the compressed pool in place. Resident: measured peak above the loaded model, in a "
        f"fresh process; stored: bytes of the tensors kept of the prefix. {_published(rows)}{describe(rows)}"
    )
    return Table(EXPERIMENT, caption, columns, lines) if lines else None


def draw_concurrency(rows: pd.DataFrame) -> Canvas | None:
    """Memory and throughput against the number of agents, log-log; one line of panels per setting."""
    found = list(_settings(rows))
    if not found:
        return None
    with plt.style.context(STYLE):
        canvas = plt.figure(figsize=(8.2, 2.9 * len(found) + 0.3))
        panels = canvas.subplots(len(found), 2, squeeze=False)
        for (memory, speed), (title, mine) in zip(panels, found, strict=True):
            lines = {
                who: {n: _measures(of) for n, of in part.groupby("n_agents")}
                for who, part in _by_reader(mine)
            }
            _stored(memory, lines)
            _panel(memory, lines, "resident", "KV memory, MB")
            _panel(speed, lines, "throughput", "tokens per second, all agents")
            memory.set_title(title)
        text = (
            "Solid: resident, peak above the loaded model. Dashed: bytes stored of the prefix. Bars: quartiles "
            "of decode steps."
        )
        canvas.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color="0.3")
    return canvas


def _speed(number: float, row: Row) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _stored(ax: Axes, lines: Lines) -> None:
    for who, by_agents in lines.items():
        if spots := _spots(by_agents, "stored"):
            ax.plot([n for n, _ in spots], [v.value for _, v in spots], "--", **_look(who))


def _panel(ax: Axes, lines: Lines, measure: str, label: str) -> None:
    """One line of `measure` a reader, with its intervals where it has them."""
    ends = []
    for who, by_agents in lines.items():
        if spots := _spots(by_agents, measure):
            at, found = zip(*spots, strict=True)
            bars = [(v.value - v.low, v.high - v.value) for v in found if v.low is not None]
            means = [v.value for v in found]
            yerr = list(zip(*bars, strict=True)) or None
            ax.errorbar(at, means, yerr=yerr, fmt="o-", capsize=2.5, **_look(who))
            ends.append((means[-1], _name(who, lines), _look(who)["color"]))
    _axes(ax, lines)
    ax.set_ylabel(label)
    label_ends(ax, ends)


def _spots(by_agents: dict[float, dict[str, Value]], measure: str) -> list[tuple[float, Value]]:
    """Number of agents and value, of those that have one."""
    found = ((n, measured[measure]) for n, measured in by_agents.items())
    return [(n, value) for n, value in found if value.value is not None]


def _axes(ax: Axes, lines: Lines) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.margins(x=0.06, y=0.1)
    ax.xaxis.set_major_locator(FixedLocator(sorted(set().union(*lines.values()))))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,g}"))
    ax.set_xlabel("agents")


def _look(who: Who) -> dict[str, object]:
    """Private and inject nearly coincide: the later line is thinner, so that both show."""
    place = READERS.index(who.reader) + (who.reader == "cascade" and who.backend == "torch")
    thin = 0.7 if who.reader == "inject" else 1.0
    return {"color": f"C{place}", "linewidth": 1.8 * thin, "markersize": 5.5 * thin}


def _name(who: Who, lines: Lines) -> str:
    """The reader, with its backend where several were run."""
    alone = sum(other.reader == who.reader for other in lines) == 1
    return who.reader if alone else f"{who.reader}, {who.backend}"


def _settings(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of what is compared with each other, and its title."""
    rows = rows[rows["experiment"] == EXPERIMENT]
    for (model, weights, device, dtype, document, context, recipe), part in rows.groupby(KEYS):
        title = f"{model} ({weights} weights), {context:,.0f} tokens ({document}), {recipe}"
        timed = part.loc[(part["metric"] == "step_time") & part["value"].notna(), "protocol"]
        yield "; ".join((title, ", ".join((device, dtype, *sorted(set(timed)))))), part


def _by_reader(rows: pd.DataFrame) -> Iterator[tuple[Who, pd.DataFrame]]:
    found = rows.groupby(["reader", "backend"])
    for key in sorted(found.groups, key=lambda key: (READERS.index(key[0]), key[1])):
        yield Who(*key), found.get_group(key)


def _measures(rows: pd.DataFrame) -> dict[str, Value]:
    """The measures of one reader and number of agents; memory in MB."""
    found = {}
    for name, (metric, protocol) in MEASURES.items():
        mine = rows[rows["metric"] == metric]
        mine = mine if protocol is None else mine[mine["protocol"] == protocol]
        scale = MB_PER_GB if metric == "kv_memory" else 1
        found[name] = value(mine.assign(value=mine["value"] * scale))
    return found


def _against(private: dict[str, Value] | None, measured: dict[str, Value]) -> Row:
    """How many times less memory, and faster, than the private reader of the same cell."""
    line = {}
    for name, measure in (("smaller", "resident"), ("faster", "step")):
        base, own = (private or {}).get(measure, Value(None)), measured[measure]
        known = base.value is not None and own.value
        line[name] = Value(
            base.value / own.value if known else None,
            note="" if known else "the private reader or this one was not measured",
        )
    return line


def _published(rows: pd.DataFrame) -> str:
    """The published gigabytes of a pool that these rows measure too: same model, agents and length."""
    measured = (
        rows[["model", "n_agents", "context_tokens"]].drop_duplicates().itertuples(index=False)
    )
    measured = list(measured)
    said = [
        figure
        for figure in published.load("polykv")
        if figure.metric == "kv_memory"
        and any(
            published.same_model(figure.model, model)
            and n_agents == figure.n_agents
            and abs(tokens / figure.prefilled_tokens - 1) <= SAME_LENGTH
            for model, n_agents, tokens in measured
        )
    ]
    texts = [
        f"{f.value.value:.3f} GB ({f.policy}, {f.n_agents} agents, {f.prefilled_tokens:,} tokens)"
        for f in said
    ]
    return f"Published, computed at fp32: {', '.join(texts)}. " if texts else ""


CONCURRENCY_TABLES: dict[str, Callable[[pd.DataFrame], Table | None]] = {EXPERIMENT: concurrency}
CONCURRENCY_FIGURES: dict[str, Callable[[pd.DataFrame], Canvas | None]] = {
    EXPERIMENT: draw_concurrency
}
