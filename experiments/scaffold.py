"""`make new-recipe NAME=x` and `make new-study NAME=x`: the files of a new quantizer or study, which run as written.

A template is the path of the file that it becomes, below experiments/templates/KIND, with `NAME` for the name.
"""

import argparse
import keyword
import sys
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from polykv.errors import PolyKVError

REPO = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).with_name("templates")
KINDS = ("recipe", "study")
SUFFIX = ".jinja2"


def files(kind: str, name: str) -> Mapping[str, str]:
    """Path in the repository -> text of each file that `kind` (one of KINDS) takes.

    Raises:
        PolyKVError: `name` cannot be the name of a Python module.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise PolyKVError(f"NAME={name!r}; give a lower-case Python identifier such as my_{kind}")
    folder = TEMPLATES / kind
    environment = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, keep_trailing_newline=True
    )
    words = {"name": name, "title": name.replace("_", " ").capitalize()}
    words["class_name"] = "".join(part.capitalize() for part in name.split("_"))
    return {
        template.replace("NAME", name).removesuffix(SUFFIX): environment.get_template(
            template
        ).render(words)
        for template in environment.list_templates()
    }


def write(kind: str, name: str, root: Path = REPO) -> list[str]:
    """Write the files below `root`; the paths written.

    Raises:
        PolyKVError: as `files`, or one of the files exists already; nothing is written then.
    """
    found = files(kind, name)
    if existing := [path for path in found if (root / path).exists()]:
        raise PolyKVError(f"{', '.join(existing)} exists already; choose another NAME")
    for path, text in found.items():
        (root / path).write_text(text, encoding="utf-8")
    return sorted(found)


def main() -> int:
    """Write the files and print their paths; the exit code."""
    parser = argparse.ArgumentParser("python -m experiments.scaffold", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("name")
    arguments = parser.parse_args()
    try:
        written = write(arguments.kind, arguments.name)
    except PolyKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(written))
    print("each runs as written; replace what is marked TODO (CONTRIBUTING.md)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
