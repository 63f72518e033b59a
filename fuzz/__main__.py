"""Fuzz for a while, and say what came of it: `python -m fuzz [card] [cell] --seconds 60`."""

import argparse
import sys
from pathlib import Path

from fuzz.run import TARGETS, fuzz
from polykv.errors import PolyKVError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("target", nargs="*", help=f"{' or '.join(TARGETS)}; both if none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that broke something")
    asked = parser.parse_args()
    broken = 0
    try:
        for target in asked.target or TARGETS:
            run = fuzz(target, asked.seconds, asked.keep)
            print(f"{target}: {run}")
            broken += run.trace is not None
    except PolyKVError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
