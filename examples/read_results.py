"""A claim, tested on a results folder with pandas: keys need more bits than values (PolyKV gives them 8 and 3).

A results folder gives one table of rows, one observation each. Here two caches of the same size are compared, k bits
for keys and v for values against v and k, document by document:

    python run.py experiment=kv_asymmetry results_dir=FOLDER && python examples/read_results.py FOLDER
"""

import sys
from itertools import combinations
from pathlib import Path

from scipy.stats import wilcoxon

from polykv.results import load_rows

PAIRS = list(combinations((8, 4, 3, 2), 2))
LEVEL = 0.05 / len(PAIRS)  # Bonferroni: as many tests as pairs


def main(folder: Path) -> None:
    rows, _ = load_rows(folder, "compare")
    # A document's mean over its scored tokens: no block of tokens in it, no statistic of all documents.
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
