"""Quantizers of key and value tensors, one method per module."""
