"""The header of a GGUF file: its metadata, its tensor directory, every claim of it checked against the file's size.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package's own reader makes several
Python objects of every vocabulary entry (2.6 s and 157 MB for SmolLM2's 49k tokens) and does not notice a cut file.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {  # value type -> its little-endian struct code
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_MAX_NESTING = 4
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One entry of the tensor directory.

    Args:
        type_name: the quantization type as the ``gguf`` package names it (``F32``, ``Q4_1`` …).
        shape: as torch has it, rows first.
        offset: first byte of the data, from the file's start.
        num_bytes: bytes of the data.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """What a GGUF file's header says."""

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, GgufTensor]


def read_gguf_metadata(path: str | Path) -> dict[str, object]:
    """The key-value pairs of a GGUF file as plain Python values (numbers, strings, bools and lists of them).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file, an unknown version, or one whose header is cut off or corrupted.
    """
    return _read(Path(path), with_tensors=False).metadata


def read_gguf_header(path: str | Path) -> GgufFile:
    """The metadata and the tensor directory of a GGUF file; every tensor's data lies inside the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_gguf_metadata`, or tensor data that is cut off, or a tensor type nobody knows.
    """
    return _read(Path(path), with_tensors=True)


def _read(path: Path, *, with_tensors: bool) -> GgufFile:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file: a GGUF model is one .gguf file")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, _Cursor(data), with_tensors)
            except _CorruptedError as error:
                raise ValueError(f"the GGUF file {path} is truncated or corrupted: {error}") from None


class _CorruptedError(Exception):
    """What is wrong with the bytes; the caller adds the file's name."""


class _Cursor:
    """Reads little-endian values one after the other, never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = len(_MAGIC)

    def take(self, num_bytes: int, what: str) -> bytes:
        end = self.position + num_bytes
        if end > len(self.data):
            raise _CorruptedError(
                f"{what} would end at byte {end}, but the file has {len(self.data)} bytes; download or convert it again"
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, code: str, what: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _CorruptedError(f"{what} at byte {self.position - len(raw)} is not UTF-8") from None

    def value(self, value_type: int, key: str, depth: int = 0) -> object:
        what = f"the value of {key!r}"
        if value_type == _STRING:
            return self.string(what)
        if value_type in _SCALARS:
            return self.number(_SCALARS[value_type], what)
        if value_type != _ARRAY or depth == _MAX_NESTING:
            raise _CorruptedError(f"{key!r} has the unknown value type {value_type}")
        item_type = self.number("I", what)
        length = self.number("Q", what)
        if item_type in _SCALARS:
            code = _SCALARS[item_type]
            raw = self.take(length * struct.calcsize("<" + code), what)
            return list(struct.unpack(f"<{length}{code}", raw))
        return [self.value(item_type, key, depth + 1) for _ in range(length)]


def _parse(path: Path, cursor: _Cursor, with_tensors: bool) -> GgufFile:
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        if version & 0xFFFF == 0:
            raise ValueError(f"{path} is a big-endian GGUF file; only little-endian ones are read")
        raise ValueError(f"{path} has GGUF version {version}; it must be one of {', '.join(map(str, _VERSIONS))}")
    num_tensors = cursor.number("Q", "the number of tensors")
    num_pairs = cursor.number("Q", "the number of metadata pairs")
    metadata: dict[str, object] = {}
    for _ in range(num_pairs):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise _CorruptedError(f"the metadata key {key!r} stands twice")
        metadata[key] = cursor.value(cursor.number("I", f"the type of {key!r}"), key)
    tensors = _parse_tensors(path, cursor, num_tensors, metadata) if with_tensors else {}
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _parse_tensors(path: Path, cursor: _Cursor, num_tensors: int, metadata: dict[str, object]) -> dict[str, GgufTensor]:
    entries = []
    for _ in range(num_tensors):
        name = cursor.string("a tensor name")
        num_dimensions = cursor.number("I", f"the shape of {name!r}")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise _CorruptedError(f"the tensor {name!r} has {num_dimensions} dimensions")
        sizes = [cursor.number("Q", f"the shape of {name!r}") for _ in range(num_dimensions)]
        type_number = cursor.number("I", f"the type of {name!r}")
        entries.append((name, tuple(reversed(sizes)), type_number, cursor.number("Q", f"the offset of {name!r}")))

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _CorruptedError(f"general.alignment={alignment!r} must be a positive integer")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_number, offset in entries:
        if name in tensors:
            raise _CorruptedError(f"the tensor {name!r} stands twice")
        type_name, num_bytes = _layout(path, name, shape, type_number)
        end = data_start + offset + num_bytes
        if end > len(cursor.data):
            raise _CorruptedError(
                f"the tensor {name!r} would end at byte {end}, but the file has {len(cursor.data)} bytes; "
                "download or convert it again"
            )
        tensors[name] = GgufTensor(
            name=name, type_name=type_name, shape=shape, offset=data_start + offset, num_bytes=num_bytes
        )
    return tensors


def _layout(path: Path, name: str, shape: tuple[int, ...], type_number: int) -> tuple[str, int]:
    """The type's name, and how many bytes a tensor of this shape takes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if type_number not in set(GGMLQuantizationType):
        raise ValueError(f"{path}: the tensor {name!r} has type number {type_number}, which is not known")
    quantization = GGMLQuantizationType(type_number)
    block_size, block_bytes = GGML_QUANT_SIZES[quantization]
    if shape[-1] % block_size:
        raise _CorruptedError(
            f"the rows of {name!r} have {shape[-1]} values, not a multiple of {quantization.name}'s {block_size}"
        )
    num_values = 1
    for size in shape:
        num_values *= size
    return quantization.name, num_values // block_size * block_bytes
