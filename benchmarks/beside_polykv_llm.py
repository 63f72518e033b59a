"""polykv-llm 0.1.0 (the package of arXiv 2604.24971) beside the recipe `polykv`: do both decode to the same tensors?

python benchmarks/beside_polykv_llm.py /my/model.gguf      (or a folder, or a name in conf/model)

Both compress the same cache of a document, layer by layer. Relative difference: the norm of the difference of what both
decode to over the norm of ours, of all layers together and of the worst one; beside it each one's error to the cache.
polykv-llm rounds the centroids of its codebook to three digits. It runs in a process of its own, since it is imported
as `polykv` too.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from packages import default_folder, ensure

SIDE = "--decode"
SIDES = ("keys", "values")
TEXT, TOKENS = "moon_landing", 512


def decode(folder: Path, packages: str) -> None:
    """polykv-llm's side: replaces each layer's file in the folder by what it is decoded to."""
    sys.path.insert(0, packages)
    from polykv.pool import SharedKVPool

    for path in folder.glob("*.npz"):
        with np.load(path) as kept:
            layer = tuple(torch.from_numpy(kept[side]) for side in SIDES)
        pool = SharedKVPool(head_dim=layer[0].shape[-1])
        pool.encode([layer])
        np.savez(
            path, **dict(zip(SIDES, (x.numpy() for x in pool.get_kv_for_layer(0)), strict=True))
        )


def main() -> None:
    if sys.argv[1:2] == [SIDE]:
        return decode(Path(sys.argv[2]), sys.argv[3])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--packages", type=Path, default=default_folder())
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    if why := ensure("polykv-llm", arguments.packages):
        sys.exit(why)
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Both sides, the table and the CSV."""
    from report import Report, show

    import polykv
    from polykv import shipped
    from polykv.prefill import prefill
    from polykv.tokens import encode

    model, tokenizer = polykv.load_model(arguments.model, device="cpu")
    ids_BT = encode(tokenizer, shipped.read(TEXT), begins=True)[:, :TOKENS]
    full = [(layer.keys, layer.values) for layer in prefill(model.float(), ids_BT).layers]
    pool = polykv.SharedKVPool.from_layers(full, polykv.load_recipe("polykv"), backend="torch")
    with tempfile.TemporaryDirectory() as folder:
        for index, layer in enumerate(full):
            pair = dict(zip(SIDES, (x.numpy() for x in layer), strict=True))
            np.savez(Path(folder) / f"{index}.npz", **pair)
        side = [sys.executable, __file__, SIDE, folder, str(arguments.packages / "polykv-llm")]
        subprocess.run(side, check=True, stdout=subprocess.DEVNULL)
        theirs = [dict(np.load(Path(folder) / f"{index}.npz")) for index in range(len(full))]
    report = Report(
        "beside_polykv_llm", {"tokens": ids_BT.shape[1]}, document=TEXT, dtype="float32"
    )
    lines = []
    for place, side in enumerate(SIDES):
        cache = [layer[place] for layer in full]
        own = [pool.decode_layer(index)[place] for index in range(len(full))]
        other = [torch.from_numpy(layer[side]) for layer in theirs]
        figures = {
            "difference": relative(other, own),
            "difference of the worst layer": max(
                relative([a], [b]) for a, b in zip(other, own, strict=True)
            ),
            "our error": relative(own, cache),
            "polykv-llm's error": relative(other, cache),
        }
        for name, value in figures.items():
            report.add(side, name.replace(" ", "_"), value, "relative")
        lines.append([side, *(f"{100 * value:.3f} %" for value in figures.values())])
    title = f"Decoded by polykv-llm 0.1.0 and by recipe polykv: {len(full)} layers, {ids_BT.shape[1]} tokens of {TEXT}"
    show(title, ["", *figures], lines, [f"written to {report.write(arguments.csv)}"])


def relative(some: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    """Norm of the difference of tensors, all together, over the norm of the others."""
    pairs = list(zip(some, other, strict=True))
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (difference / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


if __name__ == "__main__":
    main()
