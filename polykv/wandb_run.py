"""Opening of Weights & Biases runs, for the tracking of cells and for the analysis. Torch-free."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb import Run

SECONDS_TO_WAIT = 30  # for the server, at the start and at the end of a run


def open_run(folder: str | Path, **about: Any) -> "Run":
    """A run with its files in FOLDER/wandb; `about` are further arguments of `wandb.init`.

    WANDB_MODE and `wandb offline` are respected. Otherwise the run is online if there is a key (WANDB_API_KEY, netrc)
    and the server answers, else offline. It never prompts for a key.
    """
    import wandb

    place = Path(folder).resolve()
    place.mkdir(parents=True, exist_ok=True)
    # Otherwise an offline run stages artifacts in the home folder.
    os.environ.setdefault("WANDB_DATA_DIR", str(place / "wandb"))
    quiet = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,  # it is in the provenance
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
        os.environ["WANDB_MODE"] = "offline"  # so that the next cell does not wait
        return opened("offline")


def unsynced(folder: str | Path) -> str:
    """A message about offline runs below FOLDER and how to upload them; "" if there are none."""
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
