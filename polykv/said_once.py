"""Deduplication of a library's log messages: each is printed once per process, not for every cell."""

import logging


def deduplicate(library: str) -> None:
    """Make the handlers of a library's logger print each message once per process."""
    for handler in logging.getLogger(library).handlers:
        handler.addFilter(_Once())


class _Once(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._said
        self._said.add(message)
        return is_new
