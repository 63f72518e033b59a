"""Bits per layer found by the search, scored on documents that it did not see."""

import pandas as pd

from analysis.frontier import QUALITY_COLUMNS, about, by_setting, measured
from analysis.render import Column, Table, fixed, keys

SHOWN = [
    column
    for column in QUALITY_COLUMNS
    if column.name in ("stored_bits", "kl_mean", "perplexity_delta")
]


def table(rows: pd.DataFrame) -> Table | None:
    """The best table found, beside the best with equal bits in every layer."""
    lines = [
        {
            "section": setting,
            "recipe": recipe,
            "budget": budget,
            "table": part["layer_bits"].iloc[0],
        }
        | {column.name: measured(part, column.name) for column in SHOWN}
        for setting, mine in by_setting(rows)
        for (budget, recipe), part in mine.groupby(["budget_bits", "recipe"])
    ]
    columns = [
        *keys("recipe"),
        Column("budget", "budget_bits", fixed(2), key=True),
        *SHOWN,
        Column("table", "[key, value] bits by layer"),
    ]
    caption = (
        "The best bits per layer that the search found under a budget of stored bits, beside the best table with the "
        f"same bits in every layer, on fresh documents. {about(rows)}"
    )
    return Table("recipe_search", caption, columns, lines)


TABLES = {"recipe_search": table}
