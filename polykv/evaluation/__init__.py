"""Evaluators: the effect of recipes and cards on perplexity, next-token distributions, answers, memory and time."""
