"""Writing files and folders so that a crash leaves the old one or the new one, never half of one."""

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

# safetensors' names of dtypes, in the order in which its writer puts their tensors behind each other, last first.
_SAFETENSORS_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_OS_ERROR = re.compile(r"(?:os error|code:) (\d+)")  # as Rust writes it, by version


def write_text_atomically(path: str | Path, text: str) -> None:
    """Replace ``path`` by a UTF-8 file with this text."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: str | Path, data: bytes) -> None:
    """Replace ``path`` by a file with these bytes."""

    _replace_file(Path(path), lambda partial: partial.write_bytes(data))


def save_safetensors_atomically(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Replace ``path`` by a safetensors file.

    Args:
        tensors: on any device, strided or views; no two may overlap in memory.
        metadata: strings for the file's header.

    Raises:
        OSError: when it cannot be written, say on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        _replace_file(
            Path(path), lambda partial: save_file(plain, partial, metadata=dict(metadata) if metadata else None)
        )
    except SafetensorError as error:  # its word for every failure, with the system's number inside
        code = _OS_ERROR.search(str(error))
        if code is None:
            raise OSError(f"{path} could not be written: {error}") from error
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def safetensors_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that ``save_safetensors_atomically`` would write, from shapes and dtypes alone."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end, kinds = 0, list(_SAFETENSORS_DTYPES)
    # The widest elements stand first, so that all are aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-kinds.index(item[1].dtype), item[0])):
        start, end = end, end + tensor.nbytes
        kind = _SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends well and vanishes when it raises.

    Args:
        replace: an existing folder is moved away first and removed afterwards; without it an existing folder that is
            not empty is an error.

    Yields:
        The empty folder beside ``path`` to write into.

    Raises:
        FileExistsError: ``path`` is a file, or a folder with something in it and ``replace`` is false.
    """
    target = Path(os.path.realpath(path))
    _refuse_occupied(target, replace)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(target)
    partial.mkdir()
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            _flush_to_disk(file)
        _flush_to_disk(partial)
        _refuse_occupied(target, replace)  # it may have appeared meanwhile
        _swap_in(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _swap_in(partial: Path, target: Path) -> None:
    if target.exists() and _exchange(partial, target):
        _flush_to_disk(target.parent)
        shutil.rmtree(partial, ignore_errors=True)  # which holds the old files now
        return
    retired = None
    if target.exists():
        retired = _beside(target)
        target.rename(retired)
    try:
        partial.rename(target)
    except BaseException:
        if retired is not None:
            retired.rename(target)
        raise
    _flush_to_disk(target.parent)
    if retired is not None:
        shutil.rmtree(retired, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step, where the system can (Linux); otherwise there is a moment between two renames."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    at_current_folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return bool(renameat2(at_current_folder, bytes(first), at_current_folder, bytes(second), exchange) == 0)


def check_free(path: str | Path) -> None:
    """Refuse a folder that ``atomic_folder`` would not make.

    Raises:
        FileExistsError: it is a file, or a folder with something in it.
        NotADirectoryError: it would lie below a file.
        ValueError: the system lets nobody make it: its name is too long, or its place takes no new folders.
    """
    target = Path(os.path.realpath(path))
    try:
        _refuse_occupied(target, replace=False)
        around = next(parent for parent in target.parents if parent.exists())
        if not around.is_dir():
            raise NotADirectoryError(f"{around} is a file: it cannot hold the folder {target}")
        missing = target.relative_to(around).parts
        for name in missing:
            with suppress(FileNotFoundError):
                (around / name).lstat()  # refuses one that is too long
        probe = _beside(around / missing[0])
        probe.mkdir()  # what permissions alone do not tell: /proc and the like
        probe.rmdir()
    except (FileExistsError, NotADirectoryError):
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise ValueError(f"the folder {target} cannot be made: {error.strerror}") from error


def _refuse_occupied(target: Path, replace: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: a folder cannot take its place")
    if not replace and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"the folder {target} already exists and is not empty")


def _replace_file(path: Path, write: Callable[[Path], object]) -> None:
    # A link is followed, so that a user's link to a file elsewhere stays a link.
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(target)
    try:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        write(partial)
        partial.chmod(mode)  # safetensors makes its files private, whatever the umask
        _flush_to_disk(partial)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush_to_disk(target.parent)


def _beside(target: Path) -> Path:
    """A hidden name that nobody else uses, in the same folder so that a rename stays on one file system."""
    start = os.fsencode(target.name)[:100].decode(errors="ignore")  # names are limited in bytes
    return target.with_name(f".{start}.{secrets.token_hex(6)}.partial")


def _flush_to_disk(path: Path) -> None:
    if os.name == "nt":
        return  # Windows neither opens a folder nor flushes a file that is open for reading
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
