"""Handoff of an agent's KV cache to the next agent (QKVShare, arXiv 2605.03884): policies, cards, relays."""
