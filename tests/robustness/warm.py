"""What every run does first, done once by the process that runs are forked from: Hydra's parsers, a study's checks."""

from hydra import compose, initialize_config_dir

from experiments import sweep
from polykv.config import CONF

with initialize_config_dir(str(CONF), version_base="1.3"):
    sweep.prepare(
        compose(
            "config",
            ["experiment=polykv_quality", "model=reference", "recipe=polykv", "n_agents=2"],
        )
    )
