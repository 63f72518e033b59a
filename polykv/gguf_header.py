"""What a GGUF file holds, to the byte, or why it is not taken. Reads its header alone; torch-free."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from polykv import digests
from polykv.errors import PolyKVError

MAGIC = b"GGUF"
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf")
PROJECTORS = ("clip", "mmproj")
ROPE = (
    "rope_"  # how tensors begin that scale the rotary embedding and are no parameters of the model
)


@dataclass(frozen=True, eq=False)
class Header:
    """`sha256` is of the whole file; `metadata` are its keys, lists left out; `file_type` is such as Q4_K_M.

    `n_values` counts the numbers of its tensors, those in `rope` left out.
    """

    path: Path
    sha256: str
    architecture: str
    file_type: str
    metadata: Mapping[str, Any]
    n_values: int
    rope: Mapping[str, np.ndarray]


class _Reader(gguf.GGUFReader):
    """GGUFReader that steps over lists: it takes a vocabulary apart string by string, for seconds."""

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[gguf.GGUFValueType]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        buffer: Any = self.data
        end, data = orig_offs + 12, memoryview(buffer)
        if kind != gguf.GGUFValueType.STRING:
            end += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        else:
            for _ in range(count):
                end += 8 + int.from_bytes(data[end : end + 8], "little")
                if end > len(data):
                    break
        if end > len(data):
            raise ValueError("it ends within a list")
        return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


def find(path: str | Path) -> Path:
    """The GGUF file at `path`: itself, or the only one in that folder.

    Raises:
        PolyKVError: nothing is there, or a folder that holds none or several.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given
    if not given.is_dir():
        raise PolyKVError(f"no file {given}; give a GGUF file with model.path=/path/to/file.gguf")
    found = sorted(given.glob("*.gguf"))
    if len(found) != 1:
        raise PolyKVError(
            f"{given} holds {len(found) or 'no'} .gguf files; give one with model.path=/path/to/file.gguf"
        )
    return found[0]


def read(path: Path) -> Header:
    """The header of a file that can be a model; read once per process, unless the file changes.

    Raises:
        PolyKVError: no GGUF, damaged or cut short, one part of several, or no language model.
    """
    try:
        status = path.stat()
        return _read(path, status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError as error:
        raise PolyKVError(
            f"cannot read {path} ({error.strerror}); give a GGUF file that can be read"
        ) from error


@lru_cache(maxsize=64)
def _read(path: Path, *_of_version: int) -> Header:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise PolyKVError(f"{path} is no GGUF file; give one, or a folder with model=local")
    try:
        reader = _Reader(path)
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types[0] != gguf.GGUFValueType.ARRAY
        }
        architecture = str(metadata["general.architecture"])
    except Exception as error:  # the reader has no error of its own: damage can raise any
        what = " ".join(str(error).split()) or type(error).__name__
        raise PolyKVError(f"{path} is damaged or cut short ({what}); download it again") from error
    _check_kind(path, metadata, len(reader.tensors))
    rope = [tensor for tensor in reader.tensors if tensor.name.startswith(ROPE)]
    return Header(
        path=path,
        sha256=digests.sha256(path, "model.path"),
        architecture=architecture,
        file_type=_file_type(metadata, reader.tensors),
        metadata=metadata,
        n_values=sum(t.n_elements for t in reader.tensors) - sum(t.n_elements for t in rope),
        rope={tensor.name: np.array(tensor.data) for tensor in rope},
    )


def _check_kind(path: Path, metadata: Mapping[str, Any], n_tensors: int) -> None:
    kind, architecture = metadata.get("general.type", "model"), metadata["general.architecture"]
    if metadata.get("split.count", 0) > 1 or PART.search(path.name):
        raise PolyKVError(
            f"{path} is one part of a split model; join the parts (llama-gguf-split --merge) and give the result"
        )
    if architecture in PROJECTORS or kind in PROJECTORS:
        raise PolyKVError(
            f"{path} is a vision projector; give the GGUF file of the language model beside it"
        )
    if f"{architecture}.attention.sliding_window" in metadata:
        raise PolyKVError(
            f"{path} holds a {architecture} model, which has sliding-window attention; "
            "use a model whose layers all attend to every token"
        )
    if kind != "model" or n_tensors == 0:
        raise PolyKVError(
            f"{path} holds no model (its type is {kind!r}, with {n_tensors} tensors); give the file of a model"
        )


def _file_type(metadata: Mapping[str, Any], tensors: list[gguf.ReaderTensor]) -> str:
    """llama.cpp's name of how the file is quantized; where it does not say, the type of most of its numbers."""
    try:
        name = gguf.LlamaFileType(metadata["general.file_type"]).name
    except (KeyError, ValueError):
        sizes: Counter[str] = Counter()
        for tensor in tensors:
            sizes[tensor.tensor_type.name] += tensor.n_elements
        name = sizes.most_common(1)[0][0]
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")
