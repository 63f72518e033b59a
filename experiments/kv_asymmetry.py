"""Do keys need more bits than values? The grid of key bits x value bits, one recipe at all widths.

Answers no published row; PolyKV gives keys 8 bits and values 3.
"""

from experiments.recipe_frontier import MADE_BY, check, run, settle

__all__ = ["MADE_BY", "check", "run", "settle"]
