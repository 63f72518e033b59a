"""Progress reports of long computations, for a program that shows them; without a listener they do nothing."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Phase:
    """The current kind of work (prefilling the documents, say), with `done` of `total` items if they are counted."""

    name: str
    done: int = 0
    total: int | None = None


_listener: Callable[[Phase], None] | None = None


def listen(listener: Callable[[Phase], None] | None) -> None:
    """Set the listener of this process, which is called with every phase; None removes it."""
    global _listener
    _listener = listener


def phase(name: str, done: int = 0, total: int | None = None) -> None:
    """Report what is being done from now on."""
    if _listener:
        _listener(Phase(name, done, total))


def track(items: Collection[Item], name: str) -> Iterator[Item]:
    """Iterate over items, reporting each as a step of the phase `name`."""
    for done, item in enumerate(items):
        phase(name, done, len(items))
        yield item
    phase(name, len(items), len(items))
