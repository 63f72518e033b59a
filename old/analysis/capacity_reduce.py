"""The rows of `capacity` that its table and figure show, and in which order. Pure."""

import pandas as pd
from analysis.reduce import RECIPES

EXPERIMENT = "capacity"
READERS = ("private", "inject", "cascade")
ANY = "any"  # private caches have no recipe, and our assumptions no device
OWN = r"computed: (\d+) own tokens"  # the protocol of what depends on an agent's own tokens
HELD = ("nodes", "devices", "memory_gb", "usable")  # their product is what devices are ordered by
# What a row is about; of a row that says the same the newest is kept.
IDENTITY = ["model", "weights", "dtype", "device", "document", "context_tokens", "recipe", "reader"]
IDENTITY += ["backend", "n_agents", "seed", "metric", "protocol"]

Kind = tuple[str, str]  # reader and recipe


def newest(rows: pd.DataFrame) -> pd.DataFrame:
    """The experiment's newest rows with `own`; what private caches do is the same under every recipe."""
    rows = rows[rows["experiment"] == EXPERIMENT]
    own = rows["protocol"].str.extract(OWN, expand=False).astype(float)
    private = (rows["reader"] == "private") & own.notna()
    rows = rows.assign(own=own, recipe=rows["recipe"].mask(private, ANY))
    rows = rows.sort_values(["created_at", "cell"], kind="stable")
    return rows.drop_duplicates(IDENTITY, keep="last")


def devices(rows: pd.DataFrame) -> list[str]:
    """The devices, largest memory first."""
    found = rows[rows["metric"].isin(HELD)].groupby(["device", "metric"])["value"].last()
    memory = found.unstack().prod(axis=1) if len(found) else pd.Series(dtype=float)
    return sorted(memory.index, key=lambda name: (-memory[name], name))


def rank(kind: Kind) -> tuple[int, int, str]:
    reader, recipe = kind
    place = RECIPES.index(recipe) if recipe in RECIPES else len(RECIPES)
    return READERS.index(reader), place, recipe
