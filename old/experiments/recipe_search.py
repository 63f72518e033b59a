"""Which bits for each layer's keys and values are best under a budget of stored bits? Optuna searches.

Answers no published row. The study is an SQLite file beside the results, so a killed search goes on where it
stood. What it finds is measured again on documents that the search never saw, beside the best table that gives
every layer the same bits.
"""

from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common import document_rows
from experiments.recipe_frontier import MADE_BY, settle
from omegaconf import DictConfig, OmegaConf

from experiments import common, recipe_frontier
from polykv.errors import PolyKVError
from polykv.recipe import Recipe
from polykv.results import cell_id

if TYPE_CHECKING:
    import optuna

__all__ = ["MADE_BY", "check", "run", "settle"]

Table = list[list[int]]  # [key bits, value bits] of each layer


def check(cfg: DictConfig) -> None:
    """Refuse bad input, a budget below the smallest width, and a missing Optuna."""
    recipe_frontier.check(cfg)
    if find_spec("optuna") is None:
        raise PolyKVError("experiment=recipe_search needs optuna; pip install '.[search]'")
    if not isinstance(cfg.n_trials, int) or cfg.n_trials < 1:
        raise PolyKVError(f"n_trials={cfg.n_trials!r}; it takes a whole number from 1 up")
    for bits in cfg.widths:
        Recipe.from_config(OmegaConf.merge(cfg.recipe, {"layer_bits": [[bits, bits]]}))
    if not isinstance(cfg.budget_bits, int | float) or cfg.budget_bits <= min(cfg.widths):
        raise PolyKVError(
            f"budget_bits={cfg.budget_bits!r}; it takes more than the smallest width and its "
            f"metadata, here {min(cfg.widths)} bits"
        )


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Quality of the best table and of the best uniform one, on documents that the search did not see."""
    study = _study(cfg)
    _search(cfg, study)
    trials = [t for t in study.trials if t.value is not None and t.user_attrs["over"] <= 0]
    if not trials:
        raise PolyKVError(
            f"no table of the {cfg.n_trials} tried keeps within budget_bits={cfg.budget_bits}; raise it"
        )
    found = min(trials, key=lambda t: t.value).user_attrs["table"]
    same = [t for t in trials if len(set(map(tuple, t.user_attrs["table"]))) == 1]
    rows = []
    for name, table in (("search_per_layer", found), ("search_uniform", _best(same))):
        rows += _measure(cfg, name, table)
    return rows


def _study(cfg: DictConfig) -> "optuna.Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(cfg.results_dir) / "search"
    folder.mkdir(parents=True, exist_ok=True)
    name = cell_id(OmegaConf.to_container(cfg))
    study = optuna.create_study(
        storage=f"sqlite:///{folder / name}.db",
        study_name=name,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=cfg.seed, multivariate=True),
    )
    if not study.trials:  # the tables that a search has to beat come first
        n_layers = common.full_readings(cfg)[0].pool.n_layers
        for bits in product(cfg.widths, cfg.widths):
            study.enqueue_trial(
                {
                    f"{kind}{layer}": b
                    for layer in range(n_layers)
                    for kind, b in zip("kv", bits, strict=True)
                }
            )
    return study


def _search(cfg: DictConfig, study: "optuna.Study") -> None:
    import optuna

    full = common.full_readings(cfg)
    n_layers = full[0].pool.n_layers

    def objective(trial: "optuna.Trial") -> float:
        table = [
            [trial.suggest_categorical(f"{kind}{layer}", list(cfg.widths)) for kind in "kv"]
            for layer in range(n_layers)
        ]
        recipe = Recipe.from_config(OmegaConf.merge(cfg.recipe, {"layer_bits": table}))
        over = 16 / full[0].under(recipe, cfg.backend).pool.stored_ratio - cfg.budget_bits
        trial.set_user_attr("table", table)
        trial.set_user_attr("over", over)
        if over > 0:  # not worth scoring; the further over, the worse
            return 1e3 + over
        kl = [reading.under(recipe, cfg.backend).comparison.kl.mean() for reading in full]
        return float(sum(kl) / len(kl))

    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    study.optimize(objective, n_trials=max(0, cfg.n_trials - len(done)))


def _best(trials: list["optuna.trial.FrozenTrial"]) -> Table | None:
    return min(trials, key=lambda t: t.value).user_attrs["table"] if trials else None


def _measure(cfg: DictConfig, name: str, table: Table | None) -> list[dict[str, Any]]:
    recipe = OmegaConf.merge(cfg.recipe, {"name": name, "layer_bits": table})
    fresh = OmegaConf.merge(cfg, {"seed": cfg.seed + 1, "recipe": recipe})
    rows = document_rows(fresh, recipe=name, budget_bits=cfg.budget_bits)
    if table is None:
        rows.add("kl_mean", None, "nats", note="no table of equal bits was tried within the budget")
        return rows
    note = f"layer_bits={[list(bits) for bits in table]}"
    recipe_frontier.add_rows(rows, common.readings(fresh))
    for row in rows:
        row["note"] = note
    return rows
