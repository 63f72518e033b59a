"""`python -m reliability`: try what can go wrong, and write down how it was answered (make faults).

Each part is a module with `run(quick) -> list[Finding]`. What a part found is kept beside the report; started
again on the same commit, only parts run that are missing or did not survive. Exit code 1 if something failed.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from polykv.cellfile import write_atomically
from polykv.results import commit
from reliability import report
from reliability.finding import Finding

PARTS = {
    "faults": ("kills", "disk", "limits", "sharing", "damage"),
    "bad_input": ("bad_input",),
    "hostile": ("hostile",),
    "numbers": ("numbers",),
    "load": ("load",),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m reliability", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer times each, some minutes")
    parser.add_argument("--only", choices=PARTS, help="the others are taken from earlier runs")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="FOLDER")
    arguments = parser.parse_args(argv)
    # One process works at a time, and the machine may be shared; the hub is to be out of reach.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    wanted = PARTS[arguments.only] if arguments.only else sum(PARTS.values(), ())
    for part in wanted:
        run_part(part, arguments.quick, arguments.out)
    kept = {
        part: findings
        for part in sum(PARTS.values(), ())
        if (findings := load(part, arguments.quick, arguments.out)) is not None
    }
    path = arguments.out / "reliability.md"
    path.write_text(report.text(kept, arguments.quick), encoding="utf-8")
    failed = sum(not finding.survived for findings in kept.values() for finding in findings)
    print(f"{path}: {failed} failed" if failed else f"{path}: everything survived")
    return 1 if failed else 0


def run_part(part: str, quick: bool, out: Path) -> None:
    """Run a part and keep its findings, unless it was run and survived."""
    earlier = load(part, quick, out)
    if earlier and all(finding.survived for finding in earlier):
        print(f"{part}: done before, {len(earlier)} findings")
        return
    print(f"{part}: running", flush=True)
    start = time.monotonic()
    try:
        findings = importlib.import_module(f"reliability.{part}").run(quick)
    except Exception as error:  # one part's bug must not cost the others
        traceback.print_exc()
        taken = time.monotonic() - start
        findings = [Finding(part, "the part itself", 1, f"it broke: {error!r}", False, taken)]
    for finding in findings:
        verdict = "survived" if finding.survived else "FAILED"
        print(f"  {verdict}: {finding.tried} -> {finding.answered}", flush=True)
    path = _kept(part, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _settings(quick) | {"findings": [asdict(finding) for finding in findings]}
    write_atomically(path, json.dumps(content, indent=1))


def load(part: str, quick: bool, out: Path) -> list[Finding] | None:
    """What an earlier run of the part with these settings, on this commit, found; None if there is none."""
    try:
        content = json.loads(_kept(part, out).read_text(encoding="utf-8"))
        if {key: content[key] for key in _settings(quick)} != _settings(quick):
            return None
        return [Finding(**finding) for finding in content["findings"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kept(part: str, out: Path) -> Path:
    return out / "reliability" / f"{part}.json"


def _settings(quick: bool) -> dict[str, object]:
    return {"quick": quick, "commit": commit()}


if __name__ == "__main__":
    sys.exit(main())
