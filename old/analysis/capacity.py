"""Table of `capacity`: what fits, how fast it decodes, where sharing pays. Computed, and said so."""

from collections.abc import Callable, Iterator

import pandas as pd
from analysis.capacity_figure import draw_capacity
from analysis.capacity_reduce import ANY, EXPERIMENT, READERS, devices, newest, rank
from analysis.handoff_reduce import value
from analysis.reduce import Value
from matplotlib.figure import Figure as Canvas

from analysis.render import Column, Row, Table, fixed, keys, significant

SETTING = ["model", "dtype", "context_tokens", "own"]
MB_PER_GB = 1e3
PAYS = ("time_pays_agents", "memory_pays_agents", "time_pays_tokens")
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
    "GB/s: what the formula says that a step reads, over the measured step; far below the machine's own, bandwidth was "
    "not what bound it. "
)


def capacity(rows: pd.DataFrame) -> Table | None:
    """What fits and how fast it is; what was measured beside what is computed for it; the inputs."""
    rows = newest(rows)
    if rows.empty:
        return None
    lines = [*_capacity_lines(rows), *_measured_lines(rows), *_input_lines(rows)]
    columns = [
        *keys("hardware", "input", "source", "agents", "recipe", "reader", "backend"),
        Column("max_agents", "agents that fit", _whole),
        Column("throughput_most", "tokens/s, all that fit", _whole),
        Column("faster", "× private's", fixed(1)),
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
    return Table(EXPERIMENT, _caption(rows), columns, lines)


def _whole(number: float, row: Row) -> str:
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def _capacity_lines(rows: pd.DataFrame) -> Iterator[Row]:
    """A line a device, reader and recipe; a section for each setting and number of agents of a document."""
    counted = rows[rows["metric"] == "max_documents"]
    for key, n_of in counted.groupby(SETTING)["n_agents"]:
        part = rows[(rows[SETTING] == list(key)).all(axis=1)]
        model, dtype, context, own = key
        for n_agents in sorted(set(n_of)):
            title = (
                f"{model}, {dtype}: {context:,.0f} tokens, {own:,.0f} of them an agent's own; documents, steps and "
                f"shared tokens for {n_agents:.0f} agents"
            )
            for device in devices(rows):
                kinds = part[part["device"] == device].groupby(["reader", "recipe"])
                private = None
                for kind in sorted(kinds.groups, key=rank):
                    line = _capacity_line(kinds.get_group(kind), n_agents)
                    private = private or line["throughput_most"]
                    line["faster"] = _ratio(line["throughput_most"], private)
                    reader, recipe = kind
                    named = {"hardware": device, "recipe": recipe, "reader": reader}
                    yield {"section": title} | named | line


def _capacity_line(rows: pd.DataFrame, n_agents: float) -> Row:
    """Steps and documents are of `n_agents`; footnotes stand only where there is nothing."""

    def at(metric: str, n: float | None = None) -> Value:
        found = rows[rows["metric"] == metric]
        found = found if n is None else found[found["n_agents"] == n]
        number = value(found)
        reason = number.note.partition(":")[0] if number.note.startswith("never") else number.note
        none_fit = found["note"].iloc[-1] if number.value == 0 else reason
        return Value(number.value, note="" if number.value else none_fit)

    most = at("max_agents")
    fastest = at("throughput", most.value) if most.value else Value(None, note=most.note)
    line = {"max_agents": most, "throughput_most": fastest}
    line |= {
        name: at(name, n_agents)
        for name in ("max_documents", "step_time", "throughput", "weights_share")
    }
    if (rows["reader"] == "private").all():
        compared = Value(None, note="private caches are what sharing is compared with")
        return line | dict.fromkeys(PAYS, compared)
    return line | {
        name: at(name, n_agents if name == "time_pays_tokens" else None) for name in PAYS
    }


def _ratio(own: Value, private: Value) -> Value:
    if own.value is None or private.value is None:
        return Value(None, note="here not one agent fits, or not one with a private cache")
    return Value(own.value / private.value)


def _measured_lines(rows: pd.DataFrame) -> Iterator[Row]:
    """What `concurrency` measured, and what the formulas give for it."""
    metrics = ("kv_memory", "kv_memory_error", "kv_memory_allowed", "implied_bandwidth")
    keys = ["model", "weights", "device", "dtype", "document", "context_tokens", "recipe"]
    for key, part in rows[rows["metric"].isin(metrics)].groupby(keys):
        model, weights, device, dtype, document, context, recipe = key
        title = (
            f"Measured beside computed: {model} ({weights} weights), {device}, {dtype}, {context:,.0f} tokens "
            f"({document}), {recipe}"
        )
        agents = part.groupby(["n_agents", "reader", "backend"])
        for who in sorted(agents.groups, key=lambda who: (who[0], READERS.index(who[1]), who[2])):
            n_agents, reader, backend = who
            line = {"section": title, "agents": f"{n_agents:.0f}", "reader": reader}
            yield line | {"backend": backend} | _measured_line(agents.get_group(who))


def _measured_line(rows: pd.DataFrame) -> Row:
    def one(metric: str, protocol: str, scale: float = 1) -> Value:
        found = rows[(rows["metric"] == metric) & (rows["protocol"] == protocol)]
        number = value(found.assign(value=found["value"] * scale))
        return Value(number.value, note="" if number.value is not None else number.note)

    line: dict[str, Value | str] = {
        f"{name}_{kind}": one("kv_memory", f"{kind}: {name}", MB_PER_GB)
        for name in ("stored", "resident")
        for kind in ("measured", "computed")
    }
    line["resident_error"] = one("kv_memory_error", "computed: resident")
    line["resident_allowed"] = one("kv_memory_allowed", "computed: resident", MB_PER_GB)
    line["implied"] = one("implied_bandwidth", "computed: from the measured step")
    said = rows.loc[rows["metric"] == "kv_memory_error", "note"]
    return line | {"within": "NO" if said.str.contains("BEYOND").any() else "yes"}


def _input_lines(rows: pd.DataFrame) -> Iterator[Row]:
    """Each figure that goes in, with its source; what was assumed for all devices once."""
    inputs = rows[rows["protocol"].str.startswith("input: ")]
    ours = inputs["protocol"] == "input: assumption"
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
    commits = " and ".join(sorted(set(rows["commit"]) - {""})) or "not stated"
    days = sorted({text[:10] for text in rows["created_at"] if text})
    sizes = rows[rows["metric"].isin(("weights", "agent_cache"))].groupby(["model", "dtype"])
    said = []
    for (model, dtype), part in sizes:
        last = part.drop_duplicates(["metric", "context_tokens"], keep="last")
        weights = last.loc[last["metric"] == "weights", "value"].iloc[-1]
        caches = last[last["metric"] == "agent_cache"].sort_values("context_tokens")
        texts = (f"{r.value:.3g} GB at {r.context_tokens:,.0f} tokens" for r in caches.itertuples())
        said.append(
            f"{model} in {dtype}: {weights:.4g} GB of weights, a full cache of {', '.join(texts)}"
        )
    return (
        "Computed, not measured: how many agents of one document fit, how many documents with their agents, and the "
        "decode step, which gives every agent a token, by data sheet. Private: a full cache each; inject: those and "
        "the pool; cascade: one pool that all attend to, under its recipe (full: not compressed). Sharing pays where "
        "it takes so many times less than private caches as the inputs say, whether so many fit or not. "
        f"{'; '.join(said)}. {ASSUMED} "
        f"{CHECKED if (rows['metric'] == 'kv_memory_error').any() else ''}"
        f"Commit {commits}; {' to '.join(dict.fromkeys([*days[:1], *days[-1:]]))}."
    )


CAPACITY_TABLES: dict[str, Callable[[pd.DataFrame], Table | None]] = {EXPERIMENT: capacity}
CAPACITY_FIGURES: dict[str, Callable[[pd.DataFrame], Canvas | None]] = {EXPERIMENT: draw_capacity}
