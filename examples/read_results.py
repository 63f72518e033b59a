"""A claim tested with pandas on a results folder: keys need more bits than values (PolyKV gives them 8 and 3).

`load_rows` returns one table with one observation a row. Two caches of the same size are compared document by document:
k bits for keys and v for values, against v for keys and k for values.

    python run.py experiment=kv_asymmetry results_dir=FOLDER && python examples/read_results.py FOLDER
"""

import sys
from itertools import combinations
from pathlib import Path

from scipy.stats import wilcoxon

from polykv.results import load_rows

PAIRS = list(combinations((8, 4, 3, 2), 2))
LEVEL = 0.05 / len(PAIRS)  # Bonferroni


def main(folder: Path) -> None:
    rows, damaged = load_rows(folder, "compare")
    for cell in damaged:
        print(f"warning: cell {cell} cannot be read and is left out", file=sys.stderr)
    # Means of whole documents: neither of blocks of tokens nor of all documents.
    own = (rows["metric"] == "kl") & rows["sample"].notna() & rows["block"].isna()
    document = ["model", "context_tokens", "seed", "sample"]
    kl = rows[own].pivot(index=document, columns="recipe", values="value")

    print(f"mean KL, nats, of {len(kl)} documents; Wilcoxon signed-rank test, one-sided")
    shown = 0
    for more, less in PAIRS:
        keys, values = kl[f"k{more}v{less}"], kl[f"k{less}v{more}"]
        p = wilcoxon(keys, values, alternative="less").pvalue
        shown += p < LEVEL
        print(
            f"{more} and {less} bits: keys more {keys.mean():.5f}, values more {values.mean():.5f}, "
            f"keys win on {(keys < values).sum()} of {len(kl)}, p = {p:.2g}"
        )
    print(f"the claim is shown for {shown} of {len(PAIRS)} pairs, at p < {LEVEL:.4f} each")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
