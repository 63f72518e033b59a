"""lm-eval's command line with the model `polykv`; exit code 2 for what the user can mend."""

import sys

from lm_eval.__main__ import cli_evaluate

from polykv.errors import PolyKVError
from polykv.lm_eval import model  # noqa: F401 (registers it)


def main() -> int:
    """Run a command of lm-eval; the exit code."""
    try:
        cli_evaluate()
    except PolyKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
