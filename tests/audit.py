"""Known vulnerabilities among the pinned versions: `python tests/audit.py` (make audit).

pip-audit alone calls a pin that its service does not know "skipped", and ends well if all are: nobody was
asked, and it reads as if nothing was found. Here a pin that was not audited is a failure.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from polykv.errors import PolyKVError

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
SERVICES = {"osv": "api.osv.dev", "pypi": "pypi.org"}  # asked in turn, until one answers
SECONDS = 900


@dataclass(frozen=True)
class Audit:
    """What one service said of the pins. `vulnerable`: one line for each advisory, with the pin to raise to."""

    service: str
    n_audited: int
    skipped: list[str]
    vulnerable: list[str]


def audit(constraints: Path = CONSTRAINTS) -> Audit:
    """The first answer of the services.

    Raises:
        PolyKVError: none answered for any pin, with what each said.
    """
    said = []
    for service, host in SERVICES.items():
        command = [sys.executable, "-m", "pip_audit", "-r", str(constraints), "-s", service]
        command += ["--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        try:
            found = parse(service, done.stdout)
        except (ValueError, KeyError):
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            said.append(f"{host}: {last.rpartition('Caused by ')[2][:160]}")
            continue
        if found.n_audited:
            return found
        said.append(f"{host}: {found.skipped[0] if found.skipped else 'no pins'}")
    raise PolyKVError(
        f"nothing was audited, no advisory service answered ({'; '.join(said)}); run it where one can be "
        "reached, or install pip-audit: pip install -e '.[audit]'"
    )


def parse(service: str, output: str) -> Audit:
    """From pip-audit's JSON.

    Raises:
        ValueError, KeyError: it is none.
    """
    pins = json.loads(output)["dependencies"]
    skipped = [pin["skip_reason"] for pin in pins if "skip_reason" in pin]
    vulnerable = [
        f"{pin['name']} {pin['version']}: {found['id']}, "
        f"fixed in {', '.join(found['fix_versions']) or 'no version yet'}"
        for pin in pins
        for found in pin.get("vulns", [])
    ]
    return Audit(service, len(pins) - len(skipped), skipped, vulnerable)


def main() -> int:
    """Exit status 0: all audited, nothing known; 1: something to mend; 2: nobody answered."""
    try:
        found = audit()
    except PolyKVError as error:
        print(error, file=sys.stderr)
        return 2
    for line in (*found.vulnerable, *found.skipped):
        print(line)
    print(
        f"{SERVICES[found.service]}: {found.n_audited} pins audited, {len(found.skipped)} not, "
        f"{len(found.vulnerable)} advisories"
    )
    return 1 if found.vulnerable or found.skipped else 0


if __name__ == "__main__":
    sys.exit(main())
