"""Reading and validation of the header of a GGUF file. Torch-free."""

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
# Architectures whose layers with windows, and rotary bases, transformers knows without the file.
WINDOWED = ("gemma3",)
ROPE = "rope_"  # prefix of tensors that scale rotary frequencies and are not parameters


@dataclass(frozen=True, eq=False)
class Header:
    """The header of a GGUF file.

    Attributes:
        sha256: of the whole file.
        file_type: llama.cpp's name of the quantization, such as Q4_K_M.
        metadata: key -> value, without lists.
        n_values: number of weights, without those in `rope`.
        rope: tensors that scale rotary frequencies, by name.
    """

    path: Path
    sha256: str
    architecture: str
    file_type: str
    metadata: Mapping[str, Any]
    n_values: int
    rope: Mapping[str, np.ndarray]


class _Reader(gguf.GGUFReader):
    """GGUFReader that skips lists: parsing a vocabulary string by string takes seconds."""

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
    """The GGUF file at `path`, or the only one in that folder.

    Raises:
        PolyKVError: no such path, or a folder with no or several GGUF files.
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
    """The header of a GGUF model; read once per process, unless the file changes.

    Raises:
        PolyKVError: not a GGUF file, damaged or truncated, one part of a split model, or not a language model.
    """
    try:
        status = path.stat()
        return _read(path, status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError as error:
        raise PolyKVError(
            f"cannot read {path} ({error.strerror}); give a readable GGUF file"
        ) from error


@lru_cache(maxsize=64)
def _read(path: Path, *_of_version: int) -> Header:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise PolyKVError(f"{path} is not a GGUF file; give one, or a folder with model=local")
    try:
        reader = _Reader(path)
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types[0] != gguf.GGUFValueType.ARRAY
        }
        architecture = str(metadata["general.architecture"])
    except Exception as error:  # damage can raise anything in the reader
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
        _check_windows(path, architecture, metadata)
    if kind != "model" or n_tensors == 0:
        raise PolyKVError(
            f"{path} holds no model (its type is {kind!r}, with {n_tensors} tensors); give a model's file"
        )


def _check_windows(path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
    """Check that transformers' reader builds the windows that the file's model has.

    It has its own defaults for what the file may say: every sixth layer is full, the others have rotary base 10,000,
    and scores are scaled by 256 ** -0.5, which is head_dim in all sizes but 27B.

    Raises:
        PolyKVError: another architecture than Gemma 3, or other values.
    """
    given = {name.removeprefix(f"{architecture}."): value for name, value in metadata.items()}
    expected = {
        "attention.key_length": 256,
        "attention.sliding_window_pattern": 6,
        "rope.freq_base_swa": 10_000.0,
    }
    other = {name for name, value in expected.items() if given.get(name, value) != value}
    if architecture not in WINDOWED or other:
        raise PolyKVError(
            f"{path} holds a {architecture} model with sliding-window attention, whose "
            f"{' and '.join(sorted(other)) or 'layers with windows'} transformers does not read from the file; "
            "use model=local with the original checkpoint"
        )


def _file_type(metadata: Mapping[str, Any], tensors: list[gguf.ReaderTensor]) -> str:
    """llama.cpp's name of the quantization; if the file does not say, the type of most of its weights."""
    try:
        name = gguf.LlamaFileType(metadata["general.file_type"]).name
    except (KeyError, ValueError):
        sizes: Counter[str] = Counter()
        for tensor in tensors:
            sizes[tensor.tensor_type.name] += tensor.n_elements
        name = sizes.most_common(1)[0][0]
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")
