"""Weights & Biases: how a run is opened, by the tracking of cells and by the analysis. Torch-free."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb import Run

SECONDS_TO_WAIT = 30  # for a server to answer, and for the last bytes to reach it


def open_run(folder: str | Path, **about: Any) -> "Run":
    """A run that keeps its files in FOLDER/wandb; `about` goes to `wandb.init`.

    WANDB_MODE and `wandb offline` are obeyed. Else it is online where there is a key (WANDB_API_KEY,
    netrc) and the server answers, and offline where not. Nobody is asked for a key.
    """
    import wandb

    place = Path(folder).resolve()
    place.mkdir(parents=True, exist_ok=True)
    # What an offline run has yet to send would else stay behind in this machine's home.
    os.environ.setdefault("WANDB_DATA_DIR", str(place / "wandb"))
    quiet = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,  # the provenance says it
        x_disable_stats=True,
        init_timeout=SECONDS_TO_WAIT,
        finish_timeout=SECONDS_TO_WAIT,
    )

    def opened(mode: Any) -> "Run":
        return wandb.init(dir=place, mode=mode, reinit="create_new", settings=quiet, **about)

    session = wandb.setup(wandb.Settings(silent=True)).settings
    mode = os.environ.get("WANDB_MODE", session.mode)
    if mode != "online":
        return opened(mode)
    try:
        return opened("online" if wandb.login(prompt=False, verify=False) else "offline")
    except wandb.errors.CommError as error:
        reason = " ".join(str(error).split())
        print(f"warning: wandb runs are kept offline from here on ({reason})", file=sys.stderr)
        os.environ["WANDB_MODE"] = "offline"  # the next cell need not wait again
        return opened("offline")


def unsynced(folder: str | Path) -> str:
    """What is kept offline below FOLDER and how to send it, or "" where there is nothing."""
    runs = [
        run
        for run in Path(folder).glob("wandb/offline-run-*")
        if not any(run.glob("*.wandb.synced"))
    ]
    if not runs:
        return ""
    place = shlex.quote(str(Path(folder) / "wandb"))
    return (
        f"wandb runs kept offline: {len(runs)}; to send them: "
        f"python -m wandb sync {place}/offline-run-*"
    )
