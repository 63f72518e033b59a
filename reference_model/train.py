"""Train the embedded reference model: `python -m reference_model.train --size cpu|gpu`.

The run is a function of its seed: batch i of stage s is drawn from (seed, s, i), so a run that was
stopped and resumed ends in the same weights as an undisturbed one. A call works for `--minutes` at
most and goes on where the last one stopped, until `--tokens` are trained. On a GPU, in calls of less
than ten minutes: `python -m reference_model.train --size gpu --workers 12 --minutes 9`, again until
it says "finished".
"""

import argparse
import json
import math
import os
import random
import subprocess
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from polykv.reference import WEIGHTS_DIR
from polykv.reference.vocabulary import END_OF_TURN, PAD
from reference_model import curriculum
from reference_model.initial import build_in_induction
from reference_model.optim import Muon
from reference_model.rows import RESULT, ROLE_WEIGHTS, VALUE, write_row
from reference_model.tokenizer import save_tokenizer, vocabulary

SMOOTHING = 0.98  # of the metrics that the curriculum waits for
WARM_UP_STEPS = 50
DECAY_SHARE = 0.2  # of all tokens, at the end
ROPE_THETA = 1e6  # slow enough that half of the pairs carry content over a whole document
MIN_STAGE_STEPS = 100
LOG_EVERY = 20  # steps
SAVE_SECONDS = 120


@dataclass(frozen=True)
class Size:
    """A preset: geometry, batch and learning rates, all that shapes the weights but the seed."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    stages: tuple[curriculum.Stage, ...]
    batch_tokens: int
    tokens: int
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3
    weight_decay: float = 0.01


SIZES = {
    "cpu": Size(256, 4, 4, 2, 512, curriculum.CPU, batch_tokens=4096, tokens=6_400_000),
    "gpu": Size(384, 6, 6, 2, 1024, curriculum.GPU, batch_tokens=131_072, tokens=800_000_000),
}


def build_model(size: Size, seed: int) -> LlamaForCausalLM:
    """A plain Llama with head_dim 64, tied embeddings and positions to 4,096."""
    words = vocabulary()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=64,
            initializer_range=size.hidden**-0.5,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=words[END_OF_TURN],
            pad_token_id=words[PAD],
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        )
    )
    build_in_induction(model, torch.Generator().manual_seed(seed))
    return model


def draw_batch(stage: curriculum.Stage, name: str, batch_tokens: int) -> tuple[Tensor, Tensor]:
    """Rows of one kind, drawn from the name alone: ids and roles, both (rows, length)."""
    rng, words = random.Random(name), vocabulary()
    kind = stage.draw(rng)
    rows = [write_row(rng, kind) for _ in range(max(1, batch_tokens // kind.length))]
    ids = torch.tensor([[words[word] for word in row] for row, _ in rows])
    return ids, torch.tensor([roles for _, roles in rows])


class Batches:
    """The run's batches, drawn ahead by `workers` processes (0: when they are asked for)."""

    def __init__(self, size: Size, seed: int, workers: int) -> None:
        self.size, self.seed, self.workers = size, seed, workers
        self.ahead: dict[tuple[int, int], Future] = {}
        if workers:
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"))

    def take(self, stage: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of this stage and step."""
        if not self.workers:
            return draw_batch(*self._order(stage, step))
        self.ahead = {key: batch for key, batch in self.ahead.items() if key >= (stage, step)}
        for key in ((stage, step + i) for i in range(2 * self.workers)):
            if key not in self.ahead:
                self.ahead[key] = self.pool.submit(draw_batch, *self._order(*key))
        return self.ahead.pop((stage, step)).result()

    def _order(self, stage: int, step: int) -> tuple[curriculum.Stage, str, int]:
        name = f"train/{self.seed}/{stage}/{step}"
        return self.size.stages[stage], name, self.size.batch_tokens


class Run:
    """Model, optimizers and progress; everything that a checkpoint holds."""

    def __init__(self, size: Size, seed: int, device: str, workers: int = 0) -> None:
        self.size, self.seed, self.device = size, seed, device
        self.model = build_model(size, seed).to(device).train()
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        self.optimizers = {
            "muon": Muon(matrices, size.muon_lr, weight_decay=size.weight_decay),
            "adam": torch.optim.AdamW(others, size.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        }
        self.base_rates = {"muon": size.muon_lr, "adam": size.adam_lr}
        self.batches = Batches(size, seed, workers)
        self.role_weights = torch.tensor(ROLE_WEIGHTS, device=device)
        self.progress = {
            "step": 0,
            "tokens": 0,
            "stage": 0,
            "stage_steps": 0,
            "seconds": 0.0,
            "value": 0.0,
            "result": 0.0,
        }

    def set_rates(self, total_tokens: int) -> float:
        """Warm up, hold, then fall in a straight line over the last DECAY_SHARE of the tokens."""
        left = 1 - self.progress["tokens"] / total_tokens
        factor = min(1.0, (self.progress["step"] + 1) / WARM_UP_STEPS, left / DECAY_SHARE)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * self.base_rates[name]
        return factor

    def train_step(self, total_tokens: int) -> dict:
        """One batch: forward, backward, update; returns the step's log line."""
        progress = self.progress
        factor = self.set_rates(total_tokens)
        ids, roles = self.batches.take(progress["stage"], progress["step"])
        ids, roles = ids.to(self.device), roles[:, 1:].to(self.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        weights = self.role_weights[roles]
        losses = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        right = logits.argmax(-1) == ids[:, 1:]
        progress["step"] += 1
        progress["stage_steps"] += 1
        progress["tokens"] += ids.numel()
        for metric, role in (("value", VALUE), ("result", RESULT)):
            if (roles == role).any():
                now = right[roles == role].float().mean().item()
                progress[metric] += (1 - SMOOTHING) * (now - progress[metric])
        return {"loss": loss.item(), "rate": factor, "length": ids.shape[1]}

    def advance(self) -> bool:
        """Enter the next stage if the gate is passed."""
        gate = self.size.stages[self.progress["stage"]].gate
        if self.progress["value"] < gate or self.progress["stage_steps"] < MIN_STAGE_STEPS:
            return False
        self.progress.update(stage=self.progress["stage"] + 1, stage_steps=0, value=0.5)
        return True

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers.items()},
            "progress": self.progress,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.progress = state["progress"]


def describe(run: Run, command: str) -> dict:
    """What the model card says about the run."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "hidden": run.size.hidden,
        "layers": run.size.layers,
        "heads": run.size.heads,
        "kv_heads": run.size.kv_heads,
        "words": len(vocabulary()),
        "command": command,
        "seed": run.seed,
        "tokens": run.progress["tokens"],
        "steps": run.progress["step"],
        "hours": run.progress["seconds"] / 3600,
        "device": torch.cuda.get_device_name() if run.device == "cuda" else "CPU",
        "commit": git.stdout.strip() or "before the first commit",
    }


def export(run: Run, folder: Path, command: str) -> None:
    """Write the model, rounded to bfloat16, and its tokenizer; each file is replaced whole."""
    staged = folder.with_name(folder.name + ".staged")
    rounded = build_model(run.size, run.seed).to(torch.bfloat16)
    rounded.load_state_dict(run.model.state_dict())
    rounded.save_pretrained(staged)
    save_tokenizer(staged)
    (staged / "training.json").write_text(
        json.dumps(describe(run, command), indent=1) + "\n", encoding="utf-8"
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file in staged.iterdir():
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    staged.rmdir()


def train(
    run: Run, folder: Path, total_tokens: int, minutes: float = math.inf, stop: int | None = None
) -> bool:
    """Train until `total_tokens` are done; True if so, False if the minutes were over before.

    `stop` ends the call at so many tokens, as an interruption would; the learning rate falls
    towards `total_tokens` all the same.
    """
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    start = last_save = time.monotonic()
    spent_before = run.progress["seconds"]
    end = min(total_tokens, stop or total_tokens)
    while run.progress["tokens"] < end and time.monotonic() - start < 60 * minutes:
        line = run.train_step(total_tokens)
        run.progress["seconds"] = spent_before + time.monotonic() - start
        if run.advance() or run.progress["step"] % LOG_EVERY == 0:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run.progress | line) + "\n")
        if time.monotonic() - last_save > SAVE_SECONDS:
            run.save(checkpoint)
            last_save = time.monotonic()
    run.save(checkpoint)
    return run.progress["tokens"] >= total_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("build/reference"))
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIR, help="where to export")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop this call after so long"
    )
    parser.add_argument("--tokens", type=int, help="tokens in all; default: the preset's")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw batches ahead")
    args = parser.parse_args()
    size = SIZES[args.size]
    folder = args.folder / args.size
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(size, args.seed, device, args.workers)
    if (folder / "checkpoint.pt").exists():
        run.load(folder / "checkpoint.pt")
    total = args.tokens or size.tokens
    done = train(run, folder, total, args.minutes)
    command = f"python -m reference_model.train --size {args.size} --tokens {total}"
    export(run, args.weights, command)
    state = "finished" if done else "stopped; run the same command to go on"
    print(f"{state}: {json.dumps(run.progress)}")


if __name__ == "__main__":
    main()
