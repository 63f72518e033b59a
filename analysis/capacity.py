"""Table and figure of `capacity`: how many agents fit, how fast they decode, and when sharing pays. Computed."""

from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis import style
from analysis.concurrency import runs
from analysis.load import swept
from analysis.points import RECIPES, groups, settings_text
from analysis.render import (
    Column,
    Row,
    Table,
    describe,
    fixed,
    keys,
    listed,
    settings_columns,
    significant,
    span,
)
from analysis.statistics import BASELINE, Value, median, single

READERS = ("unshared", "dequantize", "in_place")
ANY = "any"  # unshared caches have no recipe, and our assumptions no device
HELD = ("nodes", "devices", "memory_gb", "usable")  # their product is what devices are ordered by
SETTING = ("model", "dtype", "context_tokens")
# What a row is about, apart from its part or sample: of cells that agree in it the newest counts.
IDENTITY = [
    "model", "weights", "dtype", "device", "context_tokens", "recipe", "reader", "backend", "n_agents", "seed",
    "metric", "source", "accounting", "suffix_tokens", "n_tokens", "n_threads", "synthetic",
]  # fmt: skip
ACROSS = 5
HEIGHT = 1.35  # inches of a panel
THICK, THIN = 2.6, 1.1  # what coincides shows both
Kind = tuple[str, str]  # reader and recipe
MB_PER_GB, BYTES_PER_GB, MS_PER_S = 1e3, 1e9, 1e3
REUSED = (
    2**18
)  # bytes that resident memory may fall short of the formula: small blocks that were free before
PAYS = ("time_pays_agents", "memory_pays_agents", "time_pays_tokens")
SPEEDS = ("step_time", "throughput", "weights_share")
INPUTS = {
    "nodes": "nodes",
    "devices": "devices of a node",
    "memory_gb": "memory of a device, GB",
    "usable": "part of it that weights and caches may take",
    "bandwidth_gb_s": "bandwidth of a device, GB/s",
    "tflops": "peak of a device, dense TFLOPS",
    "bandwidth_fraction": "part of the bandwidth that a step gets",
    "flops_fraction": "part of the peak that a step gets",
    "gain": "sharing pays from so many times less",
}
ASSUMED = (
    "Assumed beside the inputs below: agents are dealt out evenly over copies of the model; a copy is split over as "
    "many devices of a node as share its kv heads evenly, with nothing spent on talk between them; every agent holds "
    "its own tokens in full, padding among them, in the model's dtype, in a cache of transformers, which holds one "
    "tensor twice while it appends; the time of that copy is not counted; decoding a recipe's codes takes no time; "
    "weights, prefix and own tokens are read one after the other, each bound by bandwidth or by operations; "
    "activations, logits, sampling and launches take no time. So, but for the parts assumed of bandwidth and peak, "
    "times are lower bounds. GB is 1e9 bytes, of memory too, of which NVIDIA's devices report about 7 % more."
)
CHECKED = (
    "Measured beside computed: stored bytes have to agree; resident ones may exceed the formula by what is allowed. "
    "GB/s: what the formula says that a step reads, over the median measured step; far below the machine's own, "
    "bandwidth was not what bound it. "
)


def table(rows: pd.DataFrame) -> Table:
    """Capacity and speed by device, measured rows beside computed ones, and the inputs with their sources."""
    rows = newest(rows)
    lines = [*_capacity_lines(rows), *_measured_lines(rows), *_input_lines(rows)]
    columns = [
        *keys("hardware", "input", "source", "agents", "recipe", "reader", "backend"),
        *settings_columns(rows),
        Column("max_agents", "agents that fit", _whole),
        Column("throughput_most", "tokens/s, all that fit", _whole),
        Column("faster", "× unshared's", fixed(1)),
        Column("max_documents", "documents that fit", _whole),
        Column("step_time", "ms per step", fixed(1)),
        Column("throughput", "tokens/s", _whole),
        Column("weights_share", "weights, % of the step", fixed(0)),
        Column("time_pays_agents", "time pays from agents", _whole),
        Column("memory_pays_agents", "memory pays from agents", _whole),
        Column("time_pays_tokens", "time pays from shared tokens", _whole),
        Column("stored_measured", "stored, MB", fixed(2)),
        Column("stored_computed", "computed, MB", fixed(2)),
        Column("resident_measured", "resident, MB", fixed(2)),
        Column("resident_computed", "computed, MB", fixed(2)),
        Column("resident_error", "off by, %", fixed(1, "+")),
        Column("resident_allowed", "allowed, MB", fixed(2)),
        Column("within", "within", key=True),
        Column("implied", "GB/s", significant),
        Column("figure", "figure", lambda number, row: f"{number:,g}"),
    ]
    return Table("capacity", _caption(rows), columns, lines)


def _whole(number: float, row: Row) -> str:
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def _capacity_lines(rows: pd.DataFrame) -> Iterator[Row]:
    """One line per device, reader and recipe; one section per setting and number of agents per document."""
    speeds, counted = steps(rows), rows[rows["metric"] == "max_documents"]
    apart, order = swept(rows), {device: place for place, device in enumerate(devices(rows))}
    for place, of_setting in groups(counted, *SETTING, "suffix_tokens", sort=True):
        mine, fast = (_where(frame, place) for frame in (rows, speeds))
        for n_agents in sorted(set(of_setting["n_agents"])):
            line = {name: place.get(name) for name in apart} | {
                "section": f"{place['model']}, {place['dtype']}: {place['context_tokens']:,} tokens, "
                f"{place['suffix_tokens']:,} of them an agent's own; documents, steps and shared tokens for "
                f"{n_agents} agents"
            }
            lines = mine[mine["device"].isin(of_setting["device"])].groupby(
                ["device", "reader", "recipe"]
            )
            unshared: dict[str, Value] = {}  # a device's first line
            for key in sorted(lines.groups, key=lambda key: (order[key[0]], rank(key[1:]))):
                device, reader, recipe = key
                of = {"device": device, "reader": reader, "recipe": recipe}
                found = _capacity_line(lines.get_group(key), _where(fast, of), n_agents)
                most = found["throughput_most"]
                found["faster"] = _ratio(most, unshared.setdefault(device, most))
                yield line | of | {"hardware": device} | found


def _where(frame: pd.DataFrame, columns: Row) -> pd.DataFrame:
    """The rows whose columns have these values (None: missing)."""
    for name, wanted in columns.items():
        frame = frame[frame[name].isna() if wanted is None else frame[name] == wanted]
    return frame


def _capacity_line(rows: pd.DataFrame, speeds: pd.DataFrame, n_agents: int) -> Row:
    """The cells of one line; steps and documents are for `n_agents` agents."""

    def speed(name: str, n: float) -> Value:
        (found,) = speeds[speeds["n_agents"] == n].to_dict("records")
        return Value(None, note=found["note"]) if found["note"] else Value(found[name])

    most = single(rows[rows["metric"] == "max_agents"])
    fastest = speed("throughput", most.value) if most.value else Value(None, note=most.note)
    documents = single(_where(rows, {"metric": "max_documents", "n_agents": n_agents}))
    line = {"max_agents": most, "throughput_most": fastest, "max_documents": documents}
    line |= {name: speed(name, n_agents) for name in SPEEDS}
    if (rows["reader"] == "unshared").all():
        compared = Value(None, note="unshared caches are what sharing is compared with")
        return line | dict.fromkeys(PAYS, compared)
    of_agents = {"time_pays_tokens": {"n_agents": n_agents}}
    found = {name: {"metric": name} | of_agents.get(name, {}) for name in PAYS}
    return line | {name: single(_where(rows, columns)) for name, columns in found.items()}


def _ratio(own: Value, unshared: Value) -> Value:
    if own.value is None or unshared.value is None:
        return Value(None, note="here not one agent fits, or not one with an unshared cache")
    return Value(own.value / unshared.value)


def _measured_lines(rows: pd.DataFrame) -> Iterator[Row]:
    """Bytes and steps measured by `concurrency` beside what the formulas give for them."""
    if "synthetic" not in rows:
        return
    for title, part in runs(rows[rows["synthetic"].notna()]):
        agents = part.groupby(["n_agents", "reader", "backend"])
        for who in sorted(agents.groups, key=lambda who: (who[0], READERS.index(who[1]), who[2])):
            line = {"section": f"Measured beside computed: {title}", "agents": str(who[0])}
            line |= {"reader": who[1], "backend": who[2]}
            yield line | _measured_line(agents.get_group(who))


def _measured_line(rows: pd.DataFrame) -> Row:
    """Measured and computed bytes in MB, whether they agree within the tolerance, and the implied bandwidth in GB/s."""
    line: dict[str, Value | str] = {}
    agrees = []
    for accounting in ("stored", "resident"):
        mine = rows[rows["accounting"] == accounting]
        memory = mine[mine["metric"] == "kv_memory"].groupby("source")
        found = {
            kind: Value(single(memory.get_group(kind)).value)
            if kind in memory.groups
            else Value(None)
            for kind in ("measured", "computed")
        }
        found["allowed"] = single(mine[mine["metric"] == "kv_memory_allowed"])
        for kind, gb in found.items():
            note = "" if gb.value is not None else gb.note or "not measured"
            line[f"{accounting}_{kind}"] = replace(gb, note=note).map(lambda size: MB_PER_GB * size)
        sizes = [gb.value for gb in found.values()]
        if None not in sizes:
            measured, computed, allowed = (round(BYTES_PER_GB * size) for size in sizes)
            agrees.append(0 <= measured - computed <= allowed)
    measured, computed = (line[f"resident_{kind}"].value for kind in ("measured", "computed"))
    off = Value(None, note="not measured")
    if None not in (measured, computed):
        off = Value(100 * (computed - measured) / measured)
    step = median(_where(rows, {"metric": "step_time", "source": "measured"}))
    read = single(rows[rows["metric"] == "step_read"])
    speed = Value(None, note="not timed")
    if None not in (step.value, read.value):
        speed = Value(read.value / (step.value / MS_PER_S))
    within = "yes" if all(agrees) else "NO"
    none = Value(None, note="not both measured and computed")
    return line | {"resident_error": off, "implied": speed, "within": within if agrees else none}


def _input_lines(rows: pd.DataFrame) -> Iterator[Row]:
    """The inputs with their sources; assumptions that hold for all devices are listed once."""
    inputs = rows[rows["source"] == "input"]
    inputs = inputs.assign(
        device=inputs["device"].mask(inputs["assumed"] == "assumption", ANY),
        dtype=inputs["dtype"].where(inputs["metric"] == "tflops", ""),
    )
    for device in (ANY, *devices(rows)):
        for metric, said in INPUTS.items():
            found = inputs[(inputs["device"] == device) & (inputs["metric"] == metric)]
            for (dtype, number), part in found.groupby(["dtype", "value"]):
                line = {"hardware": device, "input": f"{said}, {dtype}" if dtype else said}
                line |= {"source": part["note"].iloc[-1], "figure": Value(number)}
                yield {"section": "Inputs"} | line


def _caption(rows: pd.DataFrame) -> str:
    sizes = rows[rows["metric"].isin(("weights", "agent_cache"))].groupby(["model", "dtype"])
    said = []
    for (model, dtype), part in sizes:
        last = part.drop_duplicates(["metric", "context_tokens"], keep="last")
        weights = last.loc[last["metric"] == "weights", "value"].iloc[-1]
        caches = last[last["metric"] == "agent_cache"].sort_values("context_tokens")
        texts = (f"{r.value:.3g} GB at {r.context_tokens:,} tokens" for r in caches.itertuples())
        said.append(
            f"{model} in {dtype}: {weights:.4g} GB of weights, a full cache of {', '.join(texts)}"
        )
    return (
        "Computed, not measured: how many agents of one document fit, how many documents with their agents, and the "
        "decode step, which gives every agent a token, by data sheet. unshared: a full cache each; dequantize: those "
        "and the pool; in_place: one pool that all attend to, under its recipe (full: not compressed). Sharing "
        "pays where it takes so many times less than unshared caches as the inputs say, whether so many fit or not. "
        f"{'; '.join(said)}. {ASSUMED} {CHECKED if (rows['source'] == 'measured').any() else ''}"
        f"Commit {listed(rows['commit'])}; {span(text[:10] for text in rows['created_at'])}."
    )


def newest(rows: pd.DataFrame) -> pd.DataFrame:
    """The newest rows of each line; rows of unshared caches are taken once, as they are the same under every recipe."""
    unshared = (rows["reader"] == "unshared") & rows["suffix_tokens"].notna()
    rows = rows.assign(recipe=rows["recipe"].mask(unshared, ANY))
    rows = rows.sort_values(["created_at", "cell"], kind="stable")
    line = [name for name in (*IDENTITY, *swept(rows)) if name in rows]
    last = rows.groupby(line, dropna=False)["cell"].transform("last")
    return rows[rows["cell"] == last]


def devices(rows: pd.DataFrame) -> list[str]:
    """The devices, largest memory first."""
    found = rows[rows["metric"].isin(HELD)].groupby(["device", "metric"])["value"].last()
    memory = found.unstack().prod(axis=1) if len(found) else pd.Series(dtype=float)
    return sorted(memory.index, key=lambda name: (-memory[name], name))


def rank(kind: Kind) -> tuple[int, int, str]:
    """Sort key: readers, then recipes, in the order in which they are shown."""
    reader, recipe = kind
    place = RECIPES.index(recipe) if recipe in RECIPES else len(RECIPES)
    return READERS.index(reader), place, recipe


def steps(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per computed decode step: ms, tokens/s of all agents, the weights' share in percent; or why none."""
    mine = rows[(rows["metric"] == "step_time") & rows["suffix_tokens"].notna()]
    about = [*SETTING, "device", "reader", "recipe", "suffix_tokens", "n_agents", *swept(rows)]
    linear = mine["value"].where(mine["part"] == "linear")
    groups = mine.assign(linear=linear).groupby(about, dropna=False)
    found = groups[["value", "linear"]].sum(min_count=1).assign(note=groups["note"].last())
    found = found.rename(columns={"value": "step_time"}).reset_index()
    return found.assign(
        throughput=1e3 * found["n_agents"].astype(float) / found["step_time"],
        weights_share=100 * found.pop("linear") / found["step_time"],
    )


@style.styled
def figure(rows: pd.DataFrame) -> style.Picture | str:
    """Tokens per second by agents: one panel per device and model, one line per reader and recipe."""
    used = newest(rows)
    speed = steps(used)
    if not speed["throughput"].notna().any():
        return "not one agent fits on any device"
    lines = list(_lines_of_panels(devices(used), speed))
    kinds = sorted({kind for kind, _, _ in _lines(speed)}, key=rank)
    across = max(len(places) for _, places, _ in lines)
    canvas, panels = style.sheet([heading for heading, _, _ in lines], across, HEIGHT)
    for axes, (_, places, mine) in zip(panels, lines, strict=True):
        drawn = mine[mine["throughput"].notna()]
        for place, (ax, device) in enumerate(zip(axes, places, strict=False)):
            ax.set_title(device)
            _panel(ax, mine[mine["device"] == device], kinds)
            _scale(ax, drawn)
            ax.tick_params(labelleft=place == 0)
        axes[0].set_ylabel("tokens per second")
        for ax in axes[len(places) :]:
            ax.set_axis_off()
    return style.picture(
        style.legend(canvas),
        "Tokens per second of all agents against their number, up to all that fit: computed, not measured",
        describe(used[used["source"] == "computed"], "Computed for"),
        style.Marks(dotted="more tokens of an agent's own", more="Cross: all agents that fit."),
    )


def _lines_of_panels(
    order: list[str], speed: pd.DataFrame
) -> Iterator[tuple[str, list[str], pd.DataFrame]]:
    """Heading, devices and rows of each row of panels; only the first row of a setting has a heading."""
    for run, mine in groups(speed, *SETTING, sort=True):
        places = [name for name in order if name in set(mine["device"])]
        own = sorted(set(mine["suffix_tokens"]))
        said = " or ".join(f"{number:,}" for number in dict.fromkeys([own[0], own[-1]]))
        heading = f"{run['model']}, {run['dtype']}, {run['context_tokens']:,} tokens, {said} of them an agent's own"
        heading += settings_text(run)
        for start in range(0, len(places), ACROSS):
            yield heading if not start else "", places[start : start + ACROSS], mine


def _panel(ax: Axes, rows: pd.DataFrame, kinds: list[Kind]) -> None:
    if rows["throughput"].isna().all():
        style.absent(ax, "not one agent fits")
    for (reader, recipe), own, spots in _lines(rows):
        look = _look((reader, recipe), kinds)
        at, speed = spots["n_agents"].to_numpy(float), spots["throughput"].to_numpy(float)
        if own == rows["suffix_tokens"].min():
            name = style.READERS[reader][0]
            ax.plot(at, speed, label=name if recipe == ANY else f"{recipe}, {name}", **look)
        else:
            ax.plot(at, speed, ":", **look)
        ax.plot(at[-1], speed[-1], "x", color=look["color"])


def _scale(ax: Axes, rows: pd.DataFrame) -> None:
    """The axes of a row of panels, which hold all its `rows`."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(0.6, float(rows["n_agents"].max()) * 2)
    ax.set_ylim(rows["throughput"].min() / 2, rows["throughput"].max() * 2)
    for axis in (ax.xaxis, ax.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 3), numticks=5))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(_short))
    ax.set_xlabel("agents")


def _short(number: float, _: int) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def _lines(rows: pd.DataFrame) -> Iterator[tuple[Kind, int, pd.DataFrame]]:
    """(kind, own tokens, rows) of each line: every kind at the fewest own tokens, in_place at the most too.

    Not drawn: a pool of full precision that everybody copies again.
    """
    own = rows["suffix_tokens"]
    found = rows[rows["throughput"].notna() & own.isin((own.min(), own.max()))]
    groups = found.groupby(["suffix_tokens", "reader", "recipe"])
    for key in sorted(groups.groups, key=lambda key: (key[0], rank(key[1:]))):
        of, reader, recipe = key
        alike = reader != "in_place" and of != own.min()
        if not alike and (reader, recipe) != ("dequantize", BASELINE):
            yield (reader, recipe), of, groups.get_group(key).sort_values("n_agents")


def _look(kind: Kind, kinds: list[Kind]) -> dict[str, object]:
    """Colour and width of a line; lines that coincide, such as dequantize and unshared, differ in width."""
    reader, recipe = kind
    tint = style.READERS[reader][1]
    if reader == "in_place":
        tint = style.colours(of for reader, of in kinds if reader == "in_place")[recipe]
        tint = style.SKY if recipe == BASELINE else {style.BLACK: style.BLUE}.get(tint, tint)
    thick = reader == "unshared" or kind == ("in_place", BASELINE)
    return {"color": tint, "linewidth": THICK if thick else THIN}


TABLES = {"capacity": table}
FIGURES = {"capacity": figure}
