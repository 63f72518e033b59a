"""QKVShare's time to first token, its stages and the break-even context on a GPU: llama-3.1-8b's geometry in bf16.

    python benchmarks/gpu/handoff_ttft.py            one GPU with 40 GB; resumes
    python benchmarks/gpu/handoff_ttft.py --contexts 8192 --transports memory      a part of it
    python benchmarks/gpu/handoff_ttft.py --tiny     the same path on a CPU, tiny shapes

First it checks that cards sealed on the device hold torch's bits, decode alike from their file, and give the same
result in place and dequantized. Then it runs the cells of `experiment=handoff_ttft`: re-prefill, and cards (fp16,
uniform 4 bits, adaptive 4 bits) in memory and through a file, dequantized and in place, in turn.
`python -m analysis --results results/gpu` renders the tables beside the published figures. The break-even context,
where a card's median time equals re-prefill's, is interpolated between measured contexts in log-log.
"""

import argparse
import json
from math import exp, log

import pandas as pd
import torch
from common import REPO, Bench, device_state, parser
from hydra import compose, initialize_config_dir

from analysis.handoff_ttft import timed
from experiments import sweep
from experiments.session import of_process
from polykv import config, models
from polykv.attention.cascade import attend_in_place
from polykv.handoff.card import CacheCard
from polykv.handoff.policy import load_policy
from polykv.pool import prefill

MODEL = "llama-3.1-8b"
# Tokens that the published contexts really had, then the round ones.
CONTEXTS = (476, 1939, 3877, 1024, 2048, 4096, 8192, 32768)
TINY_CONTEXTS = (128, 256)
TRANSPORTS = ("memory", "file")
APART_FROM = 8192  # tokens; from here on each transport is a cell, since a file takes minutes
REPEATS, TINY_REPEATS = 20, 10
TINY = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
IN_PLACE_TOLERANCE = 2e-2  # of logits, relative; the arithmetic around attention is in 16 bits


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--contexts", type=int, nargs="+")
    options.add_argument("--transports", choices=TRANSPORTS, nargs="+", default=TRANSPORTS)
    arguments = options.parse_args()
    bench = Bench(arguments)
    before = device_state(bench.device)
    bench.say(f"cards on {bench.device}: {check_cards(bench)}")
    failed = [outcome for outcome in cells(bench, arguments) if outcome.status == "failed"]
    states = {"script": "handoff_ttft", "before": before, "after": device_state(bench.device)}
    with (bench.store.root / "device_states.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(states) + "\n")
    report(bench)
    if failed:
        raise SystemExit("\n".join(f"error: cell {one.cell}: {one.reason}" for one in failed))


def cells(bench: Bench, arguments: argparse.Namespace) -> list[sweep.Outcome]:
    """Run what is not done."""
    outcomes = []
    contexts = arguments.contexts or (TINY_CONTEXTS if bench.tiny else CONTEXTS)
    common = [
        "experiment=handoff_ttft", f"model={MODEL}", "weights=random", f"device={bench.device.type}",
        f"results_dir={arguments.out}", f"repeats={TINY_REPEATS if bench.tiny else REPEATS}",
        *(f"model.geometry.{name}={size}" for name, size in TINY.items() if bench.tiny),
    ]  # fmt: skip
    with initialize_config_dir(version_base="1.3", config_dir=str(REPO / "conf")):
        for context in contexts:
            apart = context >= (TINY_CONTEXTS[-1] if bench.tiny else APART_FROM)
            for transports in arguments.transports if apart else (",".join(arguments.transports),):
                own = [f"context={context}", f"transports=[{transports}]"]
                cell = sweep.prepare(compose("config", [*common, *own]))
                cell.study.check(cell.settled, of_process())
                outcomes.append(sweep.run_cell(cell))
                bench.say(f"{context} tokens, {transports}: {outcomes[-1].status}")
    return outcomes


@torch.no_grad()
def check_cards(bench: Bench) -> str:
    """Check each policy's card of 300 tokens: the same file from every backend, the same bits back from the file, and
    the same result in place as dequantized.
    """
    cfg = config.load_group("model", MODEL)
    cfg.weights = "random"
    if bench.tiny:
        cfg.geometry.update(TINY)
    cfg.geometry.num_hidden_layers = 2  # what is checked does not depend on the number of layers
    model, tokenizer = models.load_weights(cfg, str(bench.device))
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(model.config.vocab_size, (300,), generator=generator)
    cache, turn_BT = prefill(model, ids_T[None]), ids_T[None, -16:].to(model.device)
    checked = []
    for policy in ("full", "fp16", "uniform", "local", "topology"):
        card, slow = (
            CacheCard.seal(cache, ids_T, model, tokenizer, policy, 4.0, backend=backend)
            for backend in ("auto", "torch")
        )
        # Signals are sums, whose order a GPU need not keep: bits are for codes that are the same.
        if not load_policy(policy).importance and card.to_bytes() != slow.to_bytes():
            raise SystemExit(f"error: a card under {policy} has other bits than torch gives it")
        again = CacheCard.from_bytes(card.to_bytes(), model, tokenizer)
        pairs = zip(card.decode(), again.decode(), strict=True)
        if not all(
            torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True)
        ):
            raise SystemExit(f"error: a card under {policy} does not decode to the same bits")
        dequantized = model(turn_BT, past_key_values=card.dequantize()).logits.float()
        with attend_in_place(model):
            in_place = model(turn_BT, past_key_values=card.reader()).logits.float()
        error = float((in_place - dequantized).norm() / dequantized.norm())
        if not error < IN_PLACE_TOLERANCE:
            raise SystemExit(f"error: a card under {policy} read in place is off by {error:.1e}")
        checked.append(f"{policy} {card.mean_bits:.3f} bits, in place within {error:.0e}")
    return "; ".join(checked)


def report(bench: Bench) -> None:
    """Median times by route, and from which context on each is faster than re-prefill."""
    found = timed(bench.rows("handoff_ttft", device=bench.device.type))
    found = found[(found["stage"] == "total") & (found["metric"] == "time")]
    found = found[found["model"].str.startswith(MODEL)]
    found = found.assign(route=found["policy"] + ", " + found["route"])
    medians = found.pivot_table("value", "context_tokens", "route", aggfunc="median").sort_index()
    bench.show("gpu_ttft", "Time to first token, median ms", medians.reset_index())
    text = "reprefill, text"
    even = [
        (route, *break_even(medians[[text, route]].dropna()))
        for route in medians.columns.drop(text)
    ]
    shown = pd.DataFrame(even, columns=["route", "tokens", "how it was found"])
    bench.show("gpu_break_even", "Break-even context, tokens", shown)


def break_even(medians: pd.DataFrame) -> tuple[float | None, str]:
    """Context from which a card (second column) is faster than re-prefill (first), and how it was found."""
    gain = [log(text / card) for text, card in medians.itertuples(index=False)]
    contexts = [float(context) for context in medians.index]
    if gain[-1] <= 0:
        return None, f"none up to {contexts[-1]:.0f} tokens: the card is slower there"
    slower = [place for place, value in enumerate(gain) if value <= 0]
    if not slower:
        return contexts[0], "or less: the card is faster at the shortest context measured"
    left = slower[-1]
    (x0, x1), (y0, y1) = map(log, contexts[left : left + 2]), gain[left : left + 2]
    found = exp(x0 - y0 * (x1 - x0) / (y1 - y0))
    return (
        found,
        f"between {contexts[left]:.0f} and {contexts[left + 1]:.0f} tokens, which were measured",
    )


if __name__ == "__main__":
    main()
