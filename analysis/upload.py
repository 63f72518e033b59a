"""What the analysis made, sent to Weights & Biases."""

from pathlib import Path

from polykv.config import load_group
from polykv.errors import PolyKVError
from polykv.wandb_run import open_run, unsynced


def upload(folder: str | Path) -> str:
    """Send the figures (PNG) and tables (CSV) below FOLDER as one run; a line that says where it is.

    Raises:
        PolyKVError: nothing was drawn there, or wandb refuses.
    """
    import wandb

    folder = Path(folder)
    figures, tables = sorted(folder.glob("figures/*.png")), sorted(folder.glob("tables/*.csv"))
    if not figures and not tables:
        raise PolyKVError(f"no figures or tables in {folder}; run `python -m analysis` on it first")
    cfg = load_group("logger", "wandb")
    about = {"project": cfg.project, "entity": cfg.entity, "name": folder.name}
    try:
        with open_run(folder, job_type="analysis", **about) as run:
            run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})
            rendered = wandb.Artifact(f"analysis-{folder.name}", type="analysis")
            for path in (*tables, *sorted(folder.glob("figures/*.pdf"))):
                rendered.add_file(str(path), name=str(path.relative_to(folder)))
            run.log_artifact(rendered)
            return run.url or unsynced(folder)
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise PolyKVError(f"wandb takes no upload ({reason}); see `wandb login --help`") from error
