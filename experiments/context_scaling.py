"""Does the perplexity delta shrink with context, as PolyKV says (+1.59 % at 1,837 tokens, +0.57 % at 7,194)?

Answers the published rows `quality` as far as they differ in context alone: many documents at each context, and
intervals; the trend is in analysis/findings.py.
"""

from experiments.recipe_frontier import MADE_BY, check, run, settle

__all__ = ["MADE_BY", "check", "run", "settle"]
