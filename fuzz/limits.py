"""What reading one file may take, whatever the file says of itself."""

import resource
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

MULTIPLE = 4  # times the file's bytes, allocated by the interpreter
FLOOR = 4 << 20  # bytes that are always granted: parsing the largest header that is looked at
RESIDENT = 64 << 20  # bytes that the process may grow by within one run, native memory included
SECONDS = 2.0  # of processor time


class OverLimit(Exception):
    """One run took more memory or time than the limits grant."""


@contextmanager
def bounded(n_bytes: int) -> Iterator[None]:
    """Everything inside must stay within the limits for a file of `n_bytes`.

    Raises:
        OverLimit: it did not.
    """
    traced = tracemalloc.is_tracing()
    tracemalloc.start()
    tracemalloc.reset_peak()
    held, resident, began = tracemalloc.get_traced_memory()[0], _resident(), time.process_time()
    try:
        yield
        taken, grown = tracemalloc.get_traced_memory()[1] - held, _resident() - resident
        seconds = time.process_time() - began
    finally:
        if not traced:  # it slows everything that comes after
            tracemalloc.stop()
    if taken > MULTIPLE * n_bytes + FLOOR or grown > RESIDENT or seconds > SECONDS:
        raise OverLimit(
            f"{n_bytes} bytes took {taken} allocated, {grown} resident and {seconds:.1f} s"
        )


def _resident() -> int:
    """The most the process ever held, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
