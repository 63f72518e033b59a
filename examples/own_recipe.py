"""Your own quantizer, measured beside the known ones without a change to polykv.

It is one module and one YAML in any folder (here own_recipe/). `--config-dir` adds the folder's YAML files to the axes,
and PYTHONPATH lets Python import the module.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from analysis.statistics import QUALITY
from polykv.results import load_rows

FOLDER = Path(__file__).resolve().parent / "own_recipe"
REPO = FOLDER.parents[1]
RECIPES = ("q4_0", "uniform", "normal_float")


def main() -> None:
    with tempfile.TemporaryDirectory() as results:
        command = [
            *(sys.executable, "run.py", "--config-dir", str(FOLDER)),
            *("experiment=recipe_frontier", f"recipe={','.join(RECIPES)}"),
            *("seed=0", "n_documents=4", f"results_dir={results}"),
        ]
        print(f"PYTHONPATH={FOLDER}", *command, "\n")
        environment = os.environ | {"PYTHONPATH": str(FOLDER)}
        subprocess.run(command, cwd=REPO, env=environment, check=True, stdout=subprocess.DEVNULL)
        rows, damaged = load_rows(results)
    for cell in damaged:
        print(f"warning: cell {cell} cannot be read and is left out", file=sys.stderr)
    print("recipe        stored bits   mean KL to the uncompressed cache, nats (95 %)")
    for recipe in RECIPES:
        own = rows[rows["recipe"] == recipe]
        ratio = own[(own["metric"] == "compression_ratio") & (own["accounting"] == "stored")]
        bits = 16 / ratio["value"].iloc[0]
        kl = QUALITY["kl_mean"].of(own)
        interval = f"{kl.value:.5f} [{kl.low:.5f}, {kl.high:.5f}]"
        print(f"{recipe:14}{bits:>11.3f}   {interval}")


if __name__ == "__main__":
    main()
