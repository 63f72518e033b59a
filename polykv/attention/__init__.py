"""Attention over a compressed, shared prefix that is never decompressed as a whole."""
