"""Model card, result page and figures, written from the log and the evaluation: no typed numbers.

`python -m reference_model.report` after `train` and `evaluate`. Reads `log.jsonl` of the run and
`evaluation.json` and `training.json` beside the weights.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from polykv import textfile
from polykv.reference import WEIGHTS_DIR

Z95 = 1.959964
LOSS_LINES = 10  # of the log, averaged for the loss at the end
METRICS = {
    "value": "fact values found (restarts at 0.5 with each stage)",
    "result": "results of steps (arithmetic)",
}


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, z2 = right / asked, Z95**2 / asked
    middle = (share + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(share * (1 - share) / asked + z2 / asked / 4) / (1 + z2)
    return middle - half, middle + half


def percent(counts: list[int]) -> str:
    """`right of asked` as a share with its interval."""
    low, high = wilson(*counts)
    return f"{counts[0] / counts[1]:.1%} ({low:.1%} to {high:.1%}; n = {counts[1]})"


def draw_curves(ax: Axes, log: list[dict]) -> Axes:
    """Training metrics over tokens, with a line where each stage of the curriculum began."""
    tokens = [line["tokens"] / 1e6 for line in log]
    for metric, label in METRICS.items():
        ax.plot(tokens, [line[metric] for line in log], label=label)
    for before, after in zip(log, log[1:], strict=False):
        if after["stage"] != before["stage"]:
            ax.axvline(after["tokens"] / 1e6, color="0.8", zorder=0)
    ax.set(xlabel="million tokens", ylabel="share right (smoothed)", ylim=(0, 1.02))
    ax.legend(loc="lower right")
    return ax


def draw_loss(ax: Axes, log: list[dict]) -> Axes:
    """Weighted loss over tokens."""
    ax.plot([line["tokens"] / 1e6 for line in log], [line["loss"] for line in log], lw=0.8)
    ax.set(xlabel="million tokens", ylabel="weighted loss (nats)", yscale="log")
    return ax


def draw_accuracy(ax: Axes, found: dict) -> Axes:
    """Exact match against context length, with the document and without."""
    lengths = [int(n) for n in found["contexts"]]
    groups = {"questions": "C0", "problems": "C1"}
    for group, colour in groups.items():
        for suffix, style in (("", "-o"), ("_dropped", ":x")):
            counts = [found["contexts"][str(n)]["counts"][group + suffix] for n in lengths]
            shares = [right / asked for right, asked in counts]
            spans = [wilson(*pair) for pair in counts]
            errors = [
                [max(0.0, share - low) for share, (low, _) in zip(shares, spans, strict=True)],
                [max(0.0, high - share) for share, (_, high) in zip(shares, spans, strict=True)],
            ]
            label = f"{group}, document dropped" if suffix else f"{group}, full cache"
            ax.errorbar(lengths, shares, errors, fmt=style, color=colour, label=label, capsize=2)
    ax.axhline(0.9, color="0.8", zorder=0)
    ax.set(xscale="log", xlabel="document tokens", ylabel="exact match", ylim=(-0.02, 1.02))
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.minorticks_off()
    ax.legend(fontsize="small")
    return ax


def accuracy_tables(found: dict) -> str:
    """Markdown: by context length, by template and kind, relays."""
    lines = [
        "| document tokens | questions | problems | questions, document dropped "
        "| problems, document dropped | restated-value perplexity | same, last 32 tokens only |",
        "| ---: | --- | --- | --- | --- | ---: | ---: |",
    ]
    for n_tokens, at in found["contexts"].items():
        groups = ("questions", "problems", "questions_dropped", "problems_dropped")
        cells = [percent(at["counts"][group]) for group in groups]
        perplexity = at["restated_value_perplexity"]
        cells += [f"{perplexity['document']:.2f}", f"{perplexity['last_tokens']:.2f}"]
        lines.append(f"| {n_tokens} | {' | '.join(cells)} |")
    contexts = list(found["contexts"])
    lines += ["", f"| problem template | alone | {' | '.join(contexts)} |"]
    lines += ["| --- | --- |" + " ---: |" * len(contexts)]
    for name, counts in found["alone"].items():
        if name.startswith("problems"):
            cells = [_share(found, n, name) for n in contexts]
            label = name.partition("/")[2] or "**all**"
            lines.append(f"| {label} | {percent(counts)} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| kind of question | {' | '.join(contexts)} |",
        "| --- |" + " ---: |" * len(contexts),
    ]
    kinds = {name for at in found["contexts"].values() for name in at["counts"]}
    for name in sorted(name for name in kinds if name.startswith("questions/")):
        cells = [_share(found, n, name) for n in contexts]
        lines.append(f"| {name.partition('/')[2]} | {' | '.join(cells)} |")
    lines += ["", "| relay | exact match |", "| --- | --- |"]
    for name, counts in found["alone"].items():
        if name.startswith("relays"):
            lines.append(f"| {name.partition('/')[2]} | {percent(counts)} |")
    return "\n".join(lines)


def _share(found: dict, n_tokens: str, name: str) -> str:
    counts = found["contexts"][n_tokens]["counts"].get(name)
    return f"{counts[0] / counts[1]:.1%}" if counts else "-"


CARD = """---
license: mit
library_name: transformers
---
# The embedded reference model of polykv

A Llama of {parameters:,} parameters ({hidden} wide, {layers} layers, {heads} heads, {kv_heads} key-value
heads of 64, tied embeddings, positions to 4,096), trained by this project, from initial weights with an
induction circuit, so that damage to a KV cache can be measured without a hub. It reads documents
about invented people, answers questions about them and solves short word problems. Every value is one token,
and every answer ends in `<eot>`.

**Usable context: {usable} tokens** (at least 90 % of questions answered correctly with a full cache up to this length).

- Data: worlds generated by `polykv.reference.world` from seeds; held-out worlds share no fact with training worlds.
- Initial weights: random, except for a constructed induction circuit (`reference_model.initial`); no weights are frozen
- Command: `{command}`, seed {seed}
- Trained: {tokens:,} tokens in {steps:,} steps, {hours:.1f} hours on {device}; final weighted loss {loss:.3f}
- Weights: rounded to bfloat16, and evaluated as such in float32
- Commit: {commit}
- Evaluation set: {n_documents} documents per length; SHA-256 `{digest}`{remarks}
- To evaluate again: `python -m reference_model.evaluate`

## Accuracy, held out

Teacher-forced exact match of the whole answer and its end of turn, with Wilson's 95 % interval.

{tables}

{curves}

## Limitations

It knows about {words} words and nothing about the world. It is not a model of English or an assistant, and it says
nothing about large models: its perplexities, accuracies and error rates compare caches and recipes
*on this model* only. Beyond its usable context its answers are unreliable even with an undamaged cache.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIR)
    parser.add_argument("--log", type=Path, default=Path("results/reference_model/log.jsonl"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    found = json.loads((args.weights / "evaluation.json").read_text(encoding="utf-8"))
    trained = json.loads((args.weights / "training.json").read_text(encoding="utf-8"))
    log = textfile.read_jsonl(args.log, "--log", dict)
    figures = args.results / "reference_model"
    figures.mkdir(parents=True, exist_ok=True)
    plots = {
        "curves": (draw_curves, log),
        "loss": (draw_loss, log),
        "accuracy": (draw_accuracy, found),
    }
    for name, (draw, data) in plots.items():
        figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
        draw(ax, data)
        figure.savefig(figures / f"{name}.png", dpi=150)
        plt.close(figure)
    (figures / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in log), encoding="utf-8"
    )
    fields = trained | {
        "remarks": "".join(f"\n- {remark}" for remark in trained.get("remarks", [])),
        "loss": sum(line["loss"] for line in log[-LOSS_LINES:]) / len(log[-LOSS_LINES:]),
        "usable": found["usable_context"],
        "digest": found["digest"],
        "n_documents": found["n_documents"],
        "tables": accuracy_tables(found),
    }
    curves = "![training curves](curves.png)"
    (args.weights / "curves.png").write_bytes((figures / "curves.png").read_bytes())
    (args.weights / "README.md").write_text(CARD.format(curves=curves, **fields), encoding="utf-8")
    page = CARD.split("---\n", 2)[2].partition("## What it must not")[0]
    shown = "\n\n".join(f"![{name}](reference_model/{name}.png)" for name in plots)
    page = page.format(curves=shown, **fields)
    (args.results / "reference_model.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
