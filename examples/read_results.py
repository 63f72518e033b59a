"""A claim, tested on a results folder with pandas: keys need more bits than values (PolyKV gives them 8 and 3).

Every results folder that the analysis has seen holds its rows in rows.csv, one observation a line. Here two caches
of the same size are compared, k bits for keys and v for values against v and k, document by document.
"""

import sys
from itertools import combinations
from pathlib import Path

import pandas as pd
from scipy.stats import wilcoxon

FRONTIER = Path(__file__).resolve().parents[1] / "results" / "frontier"
PAIRS = list(combinations((8, 4, 3, 2), 2))
LEVEL = 0.05 / len(PAIRS)  # Bonferroni: as many tests as pairs


def main(folder: Path) -> None:
    rows = pd.read_csv(folder / "rows.csv")
    rows = rows[(rows["experiment"] == "kv_asymmetry") & (rows["metric"] == "document_kl_mean")]
    # One line per document: the mean KL divergence to the uncompressed cache's predictions, in nats.
    document = ["model", "context_tokens", "seed", "protocol"]
    kl = rows.pivot(index=document, columns="recipe", values="value")

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
    main(Path(sys.argv[1]) if sys.argv[1:] else FRONTIER)
