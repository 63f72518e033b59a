"""Attention to a compressed, shared prefix that is never rebuilt."""
