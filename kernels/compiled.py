"""The operations' C++ for a CPU: compiled on first use by the machine's own compiler, for its own processor.

In plain PyTorch every elementwise pass is a call and a walk through memory. What an operation's ``cpu.cpp`` does is one
walk. Without a compiler, and for float64 and float16, the references run: slower, and the same to rounding.
"""

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
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
# No -ffast-math: a NaN must arrive. No -fopenmp at the link: torch's own threads are used, not a second set of them.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fopenmp", "-fPIC", "-fvisibility=hidden"),
)
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_COMPILER_SECONDS = 300


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
    """Whether this tensor's operation has compiled code here, or its reference runs."""
    return x.device.type == "cpu" and x.dtype in _NAMES and _Switch.is_on and compiled_library().functions is not None


def needs_compiling() -> bool:
    """Whether ``compiled_library`` is about to compile, which takes some seconds."""
    compiler = _compiler()
    with suppress(OSError, subprocess.SubprocessError):
        return compiler is not None and not _place(compiler).is_file()
    return False


@functools.cache
def compiled_library() -> Library:
    """The compiled operations; the first call of all compiles them."""
    compiler = _compiler()
    if compiler is None:
        return Library(None, problem="no C++ compiler was found (g++, clang++)")
    try:
        file = _place(compiler)
        with suppress(OSError):  # there is none yet, or a damaged one
            return Library(ctypes.CDLL(str(file)), name=file.stem)
        _compile(compiler, file)
        return Library(ctypes.CDLL(str(file)), name=file.stem)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        return Library(None, problem=f"{compiler} failed: {lines[0] if lines else f'exit code {error.returncode}'}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Library(None, problem=f"{compiler} made nothing that loads: {error}")


def _compiler() -> str | None:
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def _sources() -> list[Path]:
    return sorted(_ROOM.glob("*/cpu.cpp"))


@functools.cache
def _place(compiler: str) -> Path:
    """Where the library of these sources, by this compiler, for this processor and this torch is kept."""
    version = _output([compiler, "--version"]).splitlines()[0]
    texts = [file.read_bytes() for file in [*_sources(), *sorted(_ROOM.glob("**/*.h"))]]
    makers = "\n".join((version, *_FLAGS, platform.machine(), _cpu_features(), torch.__version__)).encode()
    key = hashlib.sha256(b"\0".join([makers, *texts])).hexdigest()[:24]
    return cache_folder() / "kernels" / f"cpu-{key}.so"


def _compile(compiler: str, file: Path) -> None:
    """Make the library beside its place and move it there, so that no process ever loads half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sources = _sources()
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".compiling-") as folder:
        objects = [Path(folder) / f"{source.parent.name}.o" for source in sources]
        running = [
            subprocess.Popen([compiler, *_FLAGS, "-c", source, "-o", made], stderr=subprocess.PIPE, text=True)
            for source, made in zip(sources, objects, strict=True)
        ]
        results = [(process, *process.communicate(timeout=_COMPILER_SECONDS)) for process in running]
        for process, _, errors in results:
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)
        made = Path(folder) / file.name
        _output([compiler, "-shared", *map(str, objects), "-o", str(made)])
        made.replace(file)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILER_SECONDS)
    return done.stdout


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
        """Run it; tensors must be laid out as the C++ says."""
        self._of(dtype)(*map(_plain, arguments), torch.get_num_threads())

    def _of(self, dtype: torch.dtype) -> Callable[..., None]:
        return _bound(f"{self._name}_{_NAMES[dtype]}", self._signature)


def _plain(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return argument.buffer_info()[0] if isinstance(argument, array) else argument


@functools.cache
def _bound(name: str, signature: str) -> Callable[..., None]:
    function = getattr(compiled_library().functions, name)
    function.argtypes = [_C_TYPES[letter] for letter in signature + "i"]
    function.restype = None
    return function
