"""`python -m analysis report`: all that results folders hold on one page, a file that needs nothing else.

What was measured comes first, topic by topic; then the papers' claims that it speaks to, the published figures,
and what produced it all. What was not run is not mentioned, but for a count of the claims left open.
The page holds its style, script, tables and figures; a content security policy lets it fetch nothing and
run nothing but its own script. All that comes from results is escaped. The same input gives the same bytes.
"""

import argparse
import base64
import errno
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from analysis.claims import AGREES, NO, OPEN, YES, Claim, claims
from analysis.registry import TOPICS, measured
from analysis.report_parts import parts, published, texts
from analysis.report_tables import shown
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis import report_origin
from analysis.load import Results
from polykv.cellfile import write_atomically
from polykv.errors import PolyKVError

COMMAND = "report"
TEMPLATES = Path(__file__).with_name("templates")
VERDICTS = {YES: "yes", NO: "no", OPEN: "open", AGREES: "computed"}
PAPERS = {"polykv": "PolyKV (arXiv 2604.24971)", "qkvshare": "QKVShare (arXiv 2605.03884)"}


def main(argv: Sequence[str]) -> tuple[str, ...]:
    """Write the page and say where it is; the damaged cells.

    Raises:
        PolyKVError: a folder holds no readable row, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        f"python -m analysis {COMMAND}", description="One HTML file with all that was measured."
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[Path("results/local")],
        metavar="FOLDER",
        help="one page of all of them; of a cell in several, the newest copy counts",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the first FOLDER"
    )
    arguments = parser.parse_args(argv)
    file = arguments.out or arguments.results[0] / "report.html"
    results, origins = report_origin.union(arguments.results)
    try:
        _check_writable(file)
        write_atomically(file, page(results, origins))
    except OSError as error:
        raise PolyKVError(
            f"cannot write {file} ({error.strerror or error}); free space or give --out another file"
        ) from error
    print(f"report: {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return results.damaged


def _check_writable(file: Path) -> None:
    """Fail before all is drawn rather than after."""
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    file.parent.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=file.parent).close()


def page(results: Results, origins: Sequence[report_origin.Origin]) -> str:
    """The whole page as HTML."""
    rows = results.rows
    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("report.css", "report.js"))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    said = claims(rows)
    judged = [claim for claim in said if claim.measured]
    return environment.get_template("report.html").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        runs=report_origin.runs(rows, measured(rows)),
        damaged=results.damaged,
        unsealed=results.unsealed,
        parts=parts(TOPICS, rows),
        texts=texts(TOPICS, rows),
        papers=_by_paper(judged),
        counts=Counter(claim.verdict for claim in judged),
        n_unmeasured=len(said) - len(judged),
        verdicts=VERDICTS,
        published=published(TOPICS, rows),
        ran=shown(report_origin.what_ran(rows, measured(rows))),
        produced=shown(report_origin.produced_by(origins)),
        settings=report_origin.settings(origins),
    )


def _by_paper(judged: Sequence[Claim]) -> dict[str, list[Claim]]:
    found: dict[str, list[Claim]] = {}
    for claim in judged:
        found.setdefault(PAPERS.get(claim.paper, claim.paper), []).append(claim)
    return found


def _hash(text: str) -> str:
    """As a content security policy names the one text that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
