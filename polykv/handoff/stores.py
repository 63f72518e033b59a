"""Reading and writing of card files: a local path, `memory://`, or any remote that fsspec supports."""

import math
import uuid

import fsspec

from polykv.handoff.cardfile import CardError

READ = 1 << 24  # bytes per read


def write(path: str, content: bytes | bytearray) -> None:
    """Write atomically: to a temporary name, then rename.

    Raises:
        CardError: the location is a folder, or not writable.
    """
    try:
        fs, place = fsspec.url_to_fs(str(path))
        if fs.isdir(place):  # moving would put the temporary file into it
            raise CardError(f"{path} is a folder; give the name of a file")
        temporary = f"{place}.{uuid.uuid4().hex[:8]}.part"
        parent = fs._parent(place)
        if parent:
            fs.makedirs(parent, exist_ok=True)
        with fs.open(temporary, "wb") as file:
            file.write(content)
        fs.mv(temporary, place)
    except (OSError, ValueError, ImportError) as error:
        raise CardError(f"cannot write {path} ({_first(error)}); give another location") from error


def read(path: str, most: float = math.inf) -> bytearray:
    """The content of a file of at most `most` bytes.

    Raises:
        CardError: no such file, not a regular file, larger than `most`, or unreadable.
    """
    try:
        fs, place = fsspec.url_to_fs(str(path))
        info = fs.info(place)
        size = info["size"] or 0
        if info["type"] != "file":
            raise CardError(f"{path} is not a file; check the path")
        if size > most:
            raise CardError(
                f"{path} has {size} bytes, more than the {most} of the model's largest card; fetch it again, or "
                "load the model that sealed it"
            )
        content = bytearray()  # grown as data arrives: the announced size is not trusted
        with fs.open(place, "rb") as file:
            while part := file.read(min(READ, size - len(content))):
                content += part
    except FileNotFoundError as error:
        raise CardError(f"there is no card at {path}; check the path") from error
    except (OSError, ValueError, ImportError) as error:
        raise CardError(f"cannot read {path} ({_first(error)}); check the path") from error
    except MemoryError as error:
        raise CardError(
            f"{path} has {size} bytes, which do not fit into memory; free some"
        ) from error
    return content


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
