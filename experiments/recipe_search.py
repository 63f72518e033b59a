"""A search by Optuna for the bits of each layer's keys and values, under a budget of stored bits.

The search is an SQLite file beside the results, so a killed one resumes. The best table is measured again on documents
that the search did not use, beside the best table with the same bits in every layer.
"""

from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from experiments import compare, settings
from experiments import rows as write
from experiments.session import Session
from experiments.study import Study
from polykv.codecs.identity import Identity
from polykv.errors import PolyKVError
from polykv.recipe import Recipe
from polykv.results import Rows

if TYPE_CHECKING:
    import optuna

# layer_bits: the table as text.
COLUMNS = {**write.BYTES, **write.SCORES, "layer_bits": str}
Table = list[list[int]]  # [key bits, value bits] of each layer


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings, the budget, and that Optuna is installed."""
    settings.check_quality(cfg, session)
    if find_spec("optuna") is None:
        raise PolyKVError("experiment=recipe_search needs optuna; pip install '.[search]'")
    settings.check_whole(cfg, "n_trials")
    recipe = Recipe.from_config(cfg.recipe)
    if any(isinstance(codec, Identity) for codec in (recipe.key, recipe.value)):
        raise PolyKVError(
            f"recipe={recipe.name} stores keys or values in full precision, so that their layers have no bits to "
            "search; use a recipe that quantizes both, such as recipe=uniform_rotated"
        )
    for bits in cfg.widths:
        Recipe.from_config(OmegaConf.merge(cfg.recipe, {"layer_bits": [[bits, bits]]}))
    if not isinstance(cfg.budget_bits, int | float) or cfg.budget_bits <= min(cfg.widths):
        raise PolyKVError(
            f"budget_bits={cfg.budget_bits!r}; it takes more than the smallest width and its "
            f"metadata, here {min(cfg.widths)} bits"
        )


def run(cfg: DictConfig, session: Session) -> Rows:
    """Scores of the best table and of the best uniform one, on documents that the search did not use."""
    search = open_search(cfg, session)
    go_on(cfg, session, search)
    trials = [t for t in search.trials if t.value is not None and t.user_attrs["over"] <= 0]
    if not trials:
        raise PolyKVError(
            f"none of {cfg.n_trials} tables is within budget_bits={cfg.budget_bits}; raise it"
        )
    same = [t for t in trials if len(set(map(tuple, t.user_attrs["table"]))) == 1]
    rows = _measure(cfg, session, "search_per_layer", _best(trials))
    rows.extend(_measure(cfg, session, "search_uniform", _best(same)))
    return rows


def open_search(cfg: DictConfig, session: Session) -> "optuna.Study":
    """The search of this cell: a new one, or the stored one."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(cfg.results_dir) / "search"
    folder.mkdir(parents=True, exist_ok=True)
    name = STUDY.identity(cfg)
    search = optuna.create_study(
        storage=f"sqlite:///{folder / name}.db",
        study_name=name,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=cfg.seed, multivariate=True),
    )
    if not search.trials:  # first the tables that the search has to beat
        n_layers = session.full_readings(cfg)[0].pool.n_layers
        for bits in product(cfg.widths, cfg.widths):
            pairs = [*zip("kv", bits, strict=True)]
            search.enqueue_trial({f"{kind}{n}": b for n in range(n_layers) for kind, b in pairs})
    return search


def go_on(cfg: DictConfig, session: Session, search: "optuna.Study") -> None:
    """Try tables until there are `n_trials`."""
    import optuna

    full = session.full_readings(cfg)
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
        if over > 0:  # not scored; worse the further it is over the budget
            return 1e3 + over
        kl = [reading.under(recipe, cfg.backend).comparison.kl.mean() for reading in full]
        return float(sum(kl) / len(kl))

    done = [t for t in search.trials if t.state == optuna.trial.TrialState.COMPLETE]
    search.optimize(objective, n_trials=max(0, cfg.n_trials - len(done)))


def _best(trials: list["optuna.trial.FrozenTrial"]) -> Table | None:
    return min(trials, key=lambda t: t.value).user_attrs["table"] if trials else None


def _measure(cfg: DictConfig, session: Session, name: str, table: Table | None) -> Rows:
    recipe = OmegaConf.merge(cfg.recipe, {"name": name, "layer_bits": table})
    fresh = OmegaConf.merge(cfg, {"seed": cfg.seed + 1, "recipe": recipe})
    about = {"recipe": name, "budget_bits": float(cfg.budget_bits)}
    about |= {"layer_bits": f"{[list(bits) for bits in table]}"} if table else {}
    rows = write.new_rows(fresh, session, COLUMNS, **about)
    if table is None:
        rows.add("kl", None, "nats", why="no table of equal bits within the budget was tried")
        return rows
    readings = session.readings(fresh)
    write.add_ratio(rows, readings[0].pool)
    write.add_readings(rows, readings)
    return rows


STUDY = Study(
    name="recipe_search",
    title="Bits for each layer",
    question="Which bits for each layer's keys and values are best under a budget of stored bits?",
    run=run,
    check=check,
    settle=compare.seeded,
    made_by=settings.SCORES,
    settings=(*settings.POOL, "budget_bits", "n_trials", "widths"),
    columns=COLUMNS,
)
