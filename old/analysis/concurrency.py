"""Table and figure of `concurrency`: memory and speed of N agents that decode together, by reader."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pandas as pd
from analysis.colours import READERS, SKY
from analysis.draw import reaches
from analysis.handoff_reduce import value
from analysis.layout import legend, number_ticks, plain_log, sheet, styled
from analysis.reduce import Value, describe
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from analysis import published
from analysis.render import Column, Row, Table, fixed, keys

EXPERIMENT = "concurrency"
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
                line["reader"] = READERS[who.reader][0]
                lines.append(line | measured | _against(private, measured))
    columns = [
        *keys("agents", "reader"),
        Column("resident", "resident, MB", fixed(1)),
        Column("smaller", "× less", fixed(1)),
        Column("step", "ms per step [quartiles]", fixed(1), interval=True),
        Column("faster", "× faster", fixed(2)),
        Column("throughput", "tokens/s [quartiles]", _speed, interval=True),
        Column("stored", "prefix stored, MB", fixed(2)),
        Column("per_agent", "resident per agent, MB", fixed(2)),
        Column("backend", "backend"),
    ]
    rows = rows[rows["experiment"] == EXPERIMENT]
    caption = (
        "Agents that decode together after one prefix. Private and inject: a full-precision copy each, in one "
        "padded batch, as transformers runs it: sdpa, and a DynamicCache, which copies a layer to append to it. "
        "Cascade: all attend to the compressed pool in place. Resident: measured peak above the loaded model, in a "
        f"fresh process; stored: bytes of the tensors kept of the prefix. {_published(rows)}{describe(rows)}"
    )
    return Table(EXPERIMENT, caption, columns, lines) if lines else None


@styled
def draw_concurrency(rows: pd.DataFrame) -> Canvas | None:
    """Memory and throughput against the number of agents, log-log; one line of panels per setting."""
    found = list(_settings(rows))
    if not found:
        return None
    canvas, panels = sheet([title.replace("; ", "\n") for title, _ in found], 2, 1.9)
    for (resident, speed), (_, mine) in zip(panels, found, strict=True):
        lines = {
            who: {n: _measures(of) for n, of in part.groupby("n_agents")}
            for who, part in _by_reader(mine)
        }
        _stored(resident, lines)
        _panel(resident, lines, "resident", "KV memory, MB")
        _panel(speed, lines, "throughput", "tokens/s, all agents")
        resident.set_title("resident; dashed: stored of the prefix")
    return legend(canvas)


def _speed(number: float, row: Row) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _stored(ax: Axes, lines: Lines) -> None:
    for who, by_agents in lines.items():
        if spots := _spots(by_agents, "stored"):
            ax.plot([n for n, _ in spots], [v.value for _, v in spots], "--", **_look(who))


def _panel(ax: Axes, lines: Lines, measure: str, label: str) -> None:
    """One line of `measure` a reader, with its intervals where it has them."""
    for who, by_agents in lines.items():
        if spots := _spots(by_agents, measure):
            at, found = zip(*spots, strict=True)
            means, name = [v.value for v in found], _name(who, lines)
            ax.errorbar(at, means, yerr=reaches(found), fmt="o-", label=name, **_look(who))
    _axes(ax, lines)
    ax.set_ylabel(label)


def _spots(by_agents: dict[float, dict[str, Value]], measure: str) -> list[tuple[float, Value]]:
    """Number of agents and value, of those that have one."""
    found = ((n, measured[measure]) for n, measured in by_agents.items())
    return [(n, value) for n, value in found if value.value is not None]


def _axes(ax: Axes, lines: Lines) -> None:
    ax.set_xscale("log")
    plain_log(ax)
    ax.margins(x=0.06, y=0.1)
    number_ticks(ax, set().union(*lines.values()))
    ax.set_xlabel("agents")


def _look(who: Who) -> dict[str, object]:
    """Private and inject nearly coincide: the later line is thinner, so that both show."""
    tint = SKY if who == Who("cascade", "torch") else READERS[who.reader][1]
    thin = 0.7 if who.reader == "inject" else 1.0
    return {"color": tint, "linewidth": 1.6 * thin, "markersize": 4.5 * thin}


def _name(who: Who, lines: Lines) -> str:
    """The reader, with its backend where several were run."""
    alone = sum(other.reader == who.reader for other in lines) == 1
    name = READERS[who.reader][0]
    return name if alone else f"{name}, {who.backend}"


def _settings(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of what is compared with each other, and its title."""
    rows = rows[rows["experiment"] == EXPERIMENT]
    for (model, weights, device, dtype, document, context, recipe), part in rows.groupby(KEYS):
        title = f"{model} ({weights} weights), {context:,.0f} tokens ({document}), {recipe}"
        timed = part.loc[(part["metric"] == "step_time") & part["value"].notna(), "protocol"]
        yield "; ".join((title, ", ".join((device, dtype, *sorted(set(timed)))))), part


def _by_reader(rows: pd.DataFrame) -> Iterator[tuple[Who, pd.DataFrame]]:
    found = rows.groupby(["reader", "backend"])
    for key in sorted(found.groups, key=lambda key: ([*READERS].index(key[0]), key[1])):
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
