"""Table of `capacity`: what fits, how fast it decodes, where sharing pays. Computed, and said so."""

from collections.abc import Iterator

import pandas as pd

from analysis.capacity_figure import ANY, READERS, devices, figure, newest, rank, steps
from analysis.concurrency import prefix_text, threads_text, with_threads
from analysis.handoff import RUN, named, run_text, settings_columns
from analysis.load import swept
from analysis.render import Column, Row, Table, fixed, keys, listed, significant
from analysis.statistics import Value, median, single

__all__ = ["FIGURES", "TABLES"]

SETTING = ["model", "dtype", "context_tokens", "suffix_tokens"]
MB_PER_GB = 1e3
BYTES_PER_GB = 1e9
MS_PER_S = 1e3
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
    """What fits and how fast it is; what was measured beside what is computed for it; the inputs."""
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
    """A line a device, reader and recipe; a section for each setting and number of agents of a document."""
    speeds, apart = steps(rows), swept(rows)
    about = [*SETTING, *apart]
    counted = rows[rows["metric"] == "max_documents"]
    places = devices(rows)
    for key, of_setting in counted.groupby(about, dropna=False):
        place = named(about, key)
        mine, fast = (_where(frame, place) for frame in (rows, speeds))
        for n_agents in sorted(set(of_setting["n_agents"])):
            title = (
                f"{place['model']}, {place['dtype']}: {place['context_tokens']:,} tokens, "
                f"{place['suffix_tokens']:,} of them an agent's own; documents, steps and shared tokens for "
                f"{n_agents} agents"
            )
            line = {"section": title} | {name: place[name] for name in apart}
            for device in (name for name in places if name in set(of_setting["device"])):
                kinds = mine[mine["device"] == device].groupby(["reader", "recipe"])
                unshared = None
                for kind in sorted(kinds.groups, key=rank):
                    of = dict(zip(("reader", "recipe"), kind, strict=True)) | {"device": device}
                    found = _capacity_line(kinds.get_group(kind), _where(fast, of), n_agents)
                    unshared = unshared or found["throughput_most"]
                    found["faster"] = _ratio(found["throughput_most"], unshared)
                    yield line | {"hardware": of.pop("device")} | of | found


def _where(frame: pd.DataFrame, columns: Row) -> pd.DataFrame:
    """The rows that have these values."""
    for name, wanted in columns.items():
        frame = frame[frame[name].isna() if wanted is None else frame[name] == wanted]
    return frame


def _capacity_line(rows: pd.DataFrame, speeds: pd.DataFrame, n_agents: int) -> Row:
    """Steps and documents are of `n_agents`; footnotes stand only where there is nothing."""

    def at(metric: str, n: int | None = None) -> Value:
        return single(_where(rows, {"metric": metric} | ({} if n is None else {"n_agents": n})))

    def speed(name: str, n: float) -> Value:
        (found,) = speeds[speeds["n_agents"] == n].to_dict("records")
        return Value(None, note=found["note"]) if found["note"] else Value(found[name])

    most = at("max_agents")
    fastest = speed("throughput", most.value) if most.value else Value(None, note=most.note)
    line = {"max_agents": most, "throughput_most": fastest}
    line["max_documents"] = at("max_documents", n_agents)
    line |= {name: speed(name, n_agents) for name in SPEEDS}
    if (rows["reader"] == "unshared").all():
        compared = Value(None, note="unshared caches are what sharing is compared with")
        return line | dict.fromkeys(PAYS, compared)
    return line | {
        name: at(name, n_agents if name == "time_pays_tokens" else None) for name in PAYS
    }


def _ratio(own: Value, unshared: Value) -> Value:
    if own.value is None or unshared.value is None:
        return Value(None, note="here not one agent fits, or not one with an unshared cache")
    return Value(own.value / unshared.value)


def _measured_lines(rows: pd.DataFrame) -> Iterator[Row]:
    """What `concurrency` measured, and what the formulas give for it."""
    if "synthetic" not in rows:
        return
    rows = with_threads(rows[rows["synthetic"].notna()])
    about = [*RUN, "synthetic", "context_tokens", "recipe", "n_threads"]
    for key, part in rows.groupby(about, dropna=False):
        run = named(about, key)
        title = (
            f"Measured beside computed: {run_text(run)}, {run['context_tokens']:,} tokens "
            f"({prefix_text(run['synthetic'])}), {run['recipe']}; {threads_text(run['n_threads'])}"
        )
        agents = part.groupby(["n_agents", "reader", "backend"])
        for who in sorted(agents.groups, key=lambda who: (who[0], READERS.index(who[1]), who[2])):
            n_agents, reader, backend = who
            line = {"section": title, "agents": str(n_agents), "reader": reader}
            yield line | {"backend": backend} | _measured_line(agents.get_group(who))


def _measured_line(rows: pd.DataFrame) -> Row:
    """Bytes in MB, whether each accounting is within what is allowed, and the bandwidth that a step would have had."""
    found: dict[tuple[str, str], Value] = {}
    agrees = []
    for accounting in ("stored", "resident"):
        of = {"accounting": accounting}
        for kind in ("measured", "computed"):
            how = of | {"metric": "kv_memory", "source": kind}
            found[accounting, kind] = Value(single(_where(rows, how)).value, note="not measured")
        found[accounting, "allowed"] = single(_where(rows, of | {"metric": "kv_memory_allowed"}))
        sizes = [found[accounting, kind].value for kind in ("measured", "computed", "allowed")]
        if None not in sizes:
            measured, computed, allowed = (round(BYTES_PER_GB * size) for size in sizes)
            agrees.append(0 <= measured - computed <= allowed)
    line: dict[str, Value | str] = {
        f"{accounting}_{kind}": Value(value.value, note="" if value.value is not None else value.note)
        .map(lambda gb: MB_PER_GB * gb)
        for (accounting, kind), value in found.items()
    }  # fmt: skip
    measured, computed = (found["resident", kind].value for kind in ("measured", "computed"))
    known = measured is not None and computed is not None
    off = 100 * (computed - measured) / measured if known else None
    line["resident_error"] = Value(off, note="" if known else "not measured")
    step = median(_where(rows, {"metric": "step_time", "source": "measured"}))
    read = single(_where(rows, {"metric": "step_read"}))
    timed = step.value is not None and read.value is not None
    speed = read.value / (step.value / MS_PER_S) if timed else None
    line["implied"] = Value(speed, note="" if timed else "not timed")
    return line | {"within": "yes" if all(agrees) else "NO"}


def _input_lines(rows: pd.DataFrame) -> Iterator[Row]:
    """Each figure that goes in, with its source; what was assumed for all devices once."""
    inputs = rows[rows["source"] == "input"]
    ours = inputs["assumed"] == "assumption"
    inputs = inputs.assign(device=inputs["device"].mask(ours, ANY))
    inputs = inputs.assign(dtype=inputs["dtype"].where(inputs["metric"] == "tflops", ""))
    for device in (ANY, *devices(rows)):
        mine = inputs[inputs["device"] == device]
        for metric, said in INPUTS.items():
            found = mine[mine["metric"] == metric]
            for (dtype, number), part in found.groupby(["dtype", "value"]):
                name = f"{said}, {dtype}" if dtype else said
                line = {"section": "Inputs", "hardware": device, "input": name}
                yield line | {"source": part["note"].iloc[-1], "figure": Value(number)}


def _caption(rows: pd.DataFrame) -> str:
    days = sorted({text[:10] for text in rows["created_at"] if text})
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
        f"Commit {listed(rows['commit'])}; {' to '.join(dict.fromkeys([*days[:1], *days[-1:]]))}."
    )


TABLES = {"capacity": table}
FIGURES = {"capacity": figure}
