"""Retrieval tasks: documents of any length that state facts in filler text, and questions about them."""
