"""Competitors' packages, each installed into a folder of its own: `polykv-llm` is imported as `polykv` too."""

import os
import subprocess
import sys
from pathlib import Path

# What pip is asked for; without dependencies, since torch and transformers are those of this environment.
PACKAGES = {
    "polykv-llm": ["polykv-llm==0.1.0"],
    "quanto": ["optimum-quanto==0.2.7"],
    "hqq": ["hqq==0.2.8.post1", "termcolor==3.3.0"],
}


def default_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "polykv" / "benchmarks"


def ensure(name: str, folder: Path) -> str | None:
    """Install the package into `folder`/`name` if it is not there; None, or why it cannot be had."""
    target = folder / name
    wanted = PACKAGES[name]
    done = target / ".installed"
    if done.is_file() and done.read_text() == "\n".join(wanted):
        return None
    print(f"installing {', '.join(wanted)} into {target} (once)", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    pip = subprocess.run([*command, "--target", target, *wanted], capture_output=True, text=True)
    if pip.returncode:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        return f"pip cannot install {wanted[0]}: {(errors or ['no reason given'])[-1]}"
    done.write_text("\n".join(wanted))
    return None
