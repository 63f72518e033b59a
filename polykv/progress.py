"""What a long computation is doing now, for a program that wants to show it. Without a listener it costs nothing."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Phase:
    """One kind of work, such as prefilling the documents: `done` of `total` items, where they are counted."""

    name: str
    done: int = 0
    total: int | None = None


_listener: Callable[[Phase], None] | None = None


def listen(listener: Callable[[Phase], None] | None) -> None:
    """Tell `listener` of every phase of this process from now on; None: nobody."""
    global _listener
    _listener = listener


def phase(name: str, done: int = 0, total: int | None = None) -> None:
    """Say what is being done from now on."""
    if _listener:
        _listener(Phase(name, done, total))


def track(items: Collection[Item], name: str) -> Iterator[Item]:
    """The items, each of them announced as one step of the phase `name`."""
    for done, item in enumerate(items):
        phase(name, done, len(items))
        yield item
    phase(name, len(items), len(items))
