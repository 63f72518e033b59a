"""Progress reports of long computations, for a program that shows them; without a listener they do nothing."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Phase:
    """The current kind of work (prefilling the documents, say), with `done` of `total` items if they are counted.

    `items`: what they are, if their number per minute is shown.
    """

    name: str
    done: float = 0
    total: int | None = None
    items: str = ""


_listener: Callable[[Phase], None] | None = None


def listen(listener: Callable[[Phase], None] | None) -> None:
    """Set the listener of this process, which is called with every phase; None removes it."""
    global _listener
    _listener = listener


def phase(name: str, done: float = 0, total: int | None = None, items: str = "") -> None:
    """Report what is being done from now on."""
    if _listener:
        _listener(Phase(name, done, total, items))


def track(found: Collection[Item], name: str, items: str = "") -> Iterator[Item]:
    """Iterate, reporting each item as a step of the phase `name`."""
    for done, item in enumerate(found):
        phase(name, done, len(found), items)
        yield item
    phase(name, len(found), len(found), items)
