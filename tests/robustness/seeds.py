"""Write the committed cards and results anew: `cd tests && python -m robustness.seeds`. Those named found-* stay."""

import json

import torch

from polykv import cellfile
from polykv.handoff.card import CacheCard
from polykv.handoff.signals import Topology
from polykv.pool import prefill
from polykv.results import Rows
from robustness.promises import CELL, CORPUS, EXPERIMENT, KEY, VOCABULARY, any_model, tiny_model

N_TOKENS = 20
BUDGETS = {
    "full": (0.0,),
    "fp16": (0.0,),
    "uniform": (3.5, 6.0, 8.0, 12.0, 16.0),
    "topology": (6.0, 9.0),
}
BUDGETS |= {"local": (8.0,), "inverse": (8.0,), "random": (8.0,), "sinks_recent": (10.0,)}


def cards() -> dict[str, bytes]:
    """One card of every policy and tier, of a half-precision model, and one that was continued."""
    model = tiny_model()
    ids_T = torch.randint(VOCABULARY, (N_TOKENS,), generator=torch.Generator().manual_seed(0))
    cache, topology = prefill(model, ids_T[None]), Topology(N_TOKENS // 2, 2)
    found = {}
    for policy, budgets in BUDGETS.items():
        for budget in budgets:
            card = CacheCard.seal(cache, ids_T, model, None, policy, budget, topology, "agent-1")
            found[f"{policy}-{budget:g}"] = bytes(card.to_bytes())
    first = CacheCard.seal(prefill(model, ids_T[None, :12]), ids_T[:12], model, None, "local", 9.0)
    found["appended"] = bytes(first.append(cache, ids_T, model, None, "local", 9.0).to_bytes())
    found["signed"] = bytes(first.to_bytes(KEY))
    return found


def cells() -> dict[str, bytes]:
    """Cell files with a digest, as `polykv.results.Store` writes them, and one from before there were any."""
    rows = Rows(model="reference", recipe="polykv", policy="uniform", budget_bits=4.0)
    rows.add("perplexity", 2.5, "ppl", ci=(2.4, 2.6), n=10)
    rows.add("kv_memory", None, "GB", note="no GPU")
    config = {"model": {"name": "reference"}, "context": 512, "seed": 0, "results_dir": "a"}
    origin = {"commit": "0" * 12, "versions": {"torch": "2.13.0"}}
    sealed = cellfile.compose(EXPERIMENT, CELL, config, origin, rows)
    older = {key: value for key, value in json.loads(sealed).items() if key != "digest"}
    return {"sealed": sealed.encode(), "older": json.dumps(older).encode()}


def main() -> None:
    with any_model:
        seeds = {"card": cards(), "cell": cells()}
    for kind, files in seeds.items():
        folder = CORPUS / kind
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        print(f"{len(files)} seeds, {sum(map(len, files.values()))} bytes in {folder}")


if __name__ == "__main__":
    main()
