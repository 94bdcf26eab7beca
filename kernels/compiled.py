"""The operations' C++ for a CPU: compiled on first use by the machine's own compiler, for its own processor.

In plain PyTorch every elementwise pass is a call and a walk through memory. What an operation's ``cpu.cpp`` does is one
walk. Without a compiler, and for float64 and float16, the references run: slower, and the same to rounding.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache_folder import cache_folder

_ROOM = Path(__file__).parent
_COMPILERS = ("g++", "clang++", "c++")
# No -ffast-math: a NaN must arrive. No -fopenmp: torch's own threads are used, not a second set of them.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fPIC", "-fvisibility=hidden"),
)
_LINK_FLAGS = ("-shared", *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()))
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_COMPILER_SECONDS = 120
_OUT_OF_RANGE = 2  # what a function returns for an index out of its range


@dataclass(frozen=True)
class Library:
    """What was compiled, or why nothing was.

    Args:
        functions: the loaded library; None without one.
        name: of what computes, so that two runs can be told apart.
        problem: what there was in its place, for people.
    """

    functions: ctypes.CDLL | None
    name: str = "plain PyTorch"
    problem: str = ""


class _Switch:
    """Whether compiled operations are taken at all."""

    is_on = True


@contextmanager
def references_only() -> Iterator[None]:
    """Within it, the whole process runs the references: to compare the two."""
    before, _Switch.is_on = _Switch.is_on, False
    try:
        yield
    finally:
        _Switch.is_on = before


def runs_compiled(x: Tensor) -> bool:
    """Whether this tensor's operation has compiled code here, or its reference runs.

    What stands for a tensor, while a graph is recorded or a function is mapped, has no memory that C++ could read.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in _NAMES
        and type(x) in (Tensor, torch.nn.Parameter)
        and _Switch.is_on
        and not _only_recorded()
        and compiled_library().functions is not None
    )


def _only_recorded() -> bool:
    modes = torch._C._TorchDispatchModeKey
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(modes.FAKE) is not None
        or torch._C._get_dispatch_mode(modes.PROXY) is not None
    )


def needs_compiling() -> bool:
    """Whether ``compiled_library`` is about to compile, which takes some seconds."""
    compiler = _compiler()
    with suppress(Exception):  # it is told when the library is asked for
        file = _place(compiler) if compiler else None
        return file is not None and not file.is_file() and not _note_beside(file).is_file()
    return False


@functools.cache
def compiled_library() -> Library:
    """The compiled operations; the first call of all compiles them."""
    compiler = _compiler()
    if compiler is None:
        return Library(None, problem="no C++ compiler was found (g++, clang++)")
    try:
        file = _place(compiler)
        if (note := _note_beside(file)).is_file():
            return Library(None, problem=f"{note.read_text(encoding='utf-8')} (noted in {note})")
        with suppress(OSError):  # there is none yet, or a damaged one
            return _loaded(file)
        _compile(compiler, file)
        return _loaded(file, compiler)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        telling = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
        return Library(None, problem=f"{compiler} failed: {telling or f'exit code {error.returncode}'}")
    except Exception as error:  # without a library everything works, so nothing about it may end a run
        return Library(None, problem=f"{compiler} made nothing that loads: {error or type(error).__name__}")


def _compiler() -> str | None:
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def _note_beside(file: Path) -> Path:
    """Why a library that was compiled does not load here: compiling it again at each start would not help."""
    return file.with_suffix(".failed")


def _loaded(file: Path, just_made_by: str = "") -> Library:
    """The library in a file that nobody else could have written.

    Raises:
        OSError: there is none, it does not load, or others may write it.
    """
    for path in (file, file.parent):
        found = path.stat()
        if hasattr(os, "getuid") and (
            found.st_uid not in (0, os.getuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        ):
            raise PermissionError(f"{path} belongs to another user, or others may write it")
    try:
        return Library(ctypes.CDLL(str(file)), name=file.stem)
    except OSError as error:
        if just_made_by:
            _note_beside(file).write_text(f"what {just_made_by} made does not load: {error}", encoding="utf-8")
        raise


def _sources() -> list[Path]:
    return sorted(_ROOM.glob("*/cpu*.cpp"))


@functools.cache
def _place(compiler: str) -> Path:
    """Where the library of these sources, by this compiler, for this processor and this torch is kept."""
    version = next(iter(_output([compiler, "--version"]).splitlines()), "")
    texts = [file.read_bytes() for file in [*_sources(), *sorted(_ROOM.glob("**/*.h"))]]
    makers = "\n".join((version, *_FLAGS, platform.machine(), _cpu_features(), torch.__version__)).encode()
    key = hashlib.sha256(b"\0".join([makers, *texts])).hexdigest()[:24]
    return cache_folder() / "kernels" / f"cpu-{key}.so"


def _compile(compiler: str, file: Path) -> None:
    """Make the library beside its place and move it there, so that no process ever loads half of one."""
    file.parent.parent.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    sources, end = _sources(), time.monotonic() + _COMPILER_SECONDS
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".compiling-") as folder:
        objects = [Path(folder) / f"{source.parent.name}-{source.stem}.o" for source in sources]
        running: list[subprocess.Popen[str]] = []
        try:
            for source, made in zip(sources, objects, strict=True):
                command = [compiler, *_FLAGS, "-c", str(source), "-o", str(made)]
                running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace"))
            for process in running:
                _, errors = process.communicate(timeout=max(0.0, end - time.monotonic()))
                if process.returncode:
                    raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)
        finally:
            for process in running:
                process.kill()
                process.wait()
                assert process.stderr is not None
                process.stderr.close()
        made = Path(folder) / file.name
        _output([compiler, *_LINK_FLAGS, *map(str, objects), "-o", str(made)])
        made.chmod(0o700)
        made.replace(file)


def _output(command: list[str]) -> str:
    settings: dict[str, Any] = {"text": True, "errors": "replace", "timeout": _COMPILER_SECONDS}
    return str(subprocess.run(command, check=True, capture_output=True, **settings).stdout)


def _cpu_features() -> str:
    """What the compiler may use on this processor; a home folder may serve several machines."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


class CompiledFunction:
    """A function of the compiled library, one for each dtype.

    Args:
        name: without the dtype.
        signature: a letter an argument: ``p`` a tensor or array (or None), ``i`` an int, ``d`` a float. The
            number of threads follows by itself.
    """

    def __init__(self, name: str, signature: str) -> None:
        self._name, self._signature = name, signature

    def __call__(self, dtype: torch.dtype, *arguments: Any) -> None:
        """Run it; tensors must be laid out as the C++ says.

        Raises:
            MemoryError: there was not enough.
            IndexError: an index among the arguments is out of range.
        """
        failure = self._of(dtype)(*map(_plain, arguments), torch.get_num_threads())
        if failure == _OUT_OF_RANGE:
            raise IndexError(f"{self._name}: an index is out of range")
        if failure:
            raise MemoryError(f"not enough memory for {self._name}")

    def _of(self, dtype: torch.dtype) -> Callable[..., int]:
        return _bound(f"{self._name}_{_NAMES[dtype]}", self._signature)


def _plain(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        address = argument.data_ptr()
        assert address or not argument.numel(), "a tensor without memory"
        return address
    return argument.buffer_info()[0] if isinstance(argument, array) else argument


@functools.cache
def _bound(name: str, signature: str) -> Callable[..., int]:
    function = getattr(compiled_library().functions, name)
    function.argtypes = [_C_TYPES[letter] for letter in signature + "i"]
    function.restype = ctypes.c_int
    return function
