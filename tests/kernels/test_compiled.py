"""The CPU's C++ is compiled once, kept, never half there, and missed by nothing but time where it cannot be made."""

import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from builders import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moe_peft.kernels import compiled
from moe_peft.kernels.causal_attention.op import causal_attention
from moe_peft.kernels.compiled import compiled_library, references_only, runs_compiled
from moe_peft.kernels.lora_linear.op import lora_linear
from moe_peft.kernels.lora_linear.ranges import LoraRange
from moe_peft.kernels.recompute import Recomputable
from moe_peft.kernels.rms_norm.op import rms_norm
from moe_peft.kernels.swiglu.op import swiglu
from moe_peft.kernels.wide_linear.op import wide_linear

SOURCES = ("compiled.h", "swiglu/cpu.cpp")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has compiled nothing yet, with an empty cache and one operation's sources of its own."""
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "cache"))
    room = tmp_path / "room"
    (room / "swiglu").mkdir(parents=True)
    for name in SOURCES:
        shutil.copy(Path(compiled.__file__).parent / name, room / name)
    monkeypatch.setattr(compiled, "_ROOM", room)
    caches = (compiled.compiled_library, compiled._place, compiled._bound)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path / "cache" / "kernels"
    for cached in caches:
        cached.cache_clear()


def test_it_is_compiled_once(fresh, monkeypatch):
    assert compiled.needs_compiling() == (compiled._compiler() is not None)
    first = compiled_library()
    assert not compiled.needs_compiling()
    if first.functions is None:
        pytest.skip(first.problem)
    (file,) = fresh.iterdir()  # nothing else is left there
    assert file.suffix == ".so"
    compiled_library.cache_clear()
    monkeypatch.setattr(compiled, "_compile", lambda *args: pytest.fail("compiled again"))
    assert compiled_library().functions is not None


def test_other_sources_are_another_library(fresh, monkeypatch, tmp_path):
    if compiled_library().functions is None:
        pytest.skip(compiled_library().problem)
    for name in SOURCES:
        with (tmp_path / "room" / name).open("a", encoding="utf-8") as file:
            file.write("// changed\n")
    compiled._place.cache_clear()
    compiled_library.cache_clear()
    assert compiled_library().functions is not None
    assert len(list(fresh.iterdir())) == 2


def test_processes_that_compile_at_once(fresh):
    if compiled_library().functions is None:
        pytest.skip(compiled_library().problem)
    (file,) = fresh.iterdir()
    file.unlink()
    code = (
        "from pathlib import Path; from moe_peft.kernels import compiled;"
        f"compiled._ROOM = Path({str(compiled._ROOM)!r}); assert compiled.compiled_library().functions is not None"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=300) for process in running] == [0, 0, 0]
    assert [found.name for found in fresh.iterdir()] == [file.name]


def test_without_a_compiler_the_references_run(fresh, monkeypatch):
    x = torch.randn(5, 33)
    usual = swiglu(x, x)
    compiled_library.cache_clear()
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert "no C++ compiler was found" in compiled_library().problem
    assert not runs_compiled(x)
    assert_close(swiglu(x, x), usual, 1e-6)


def test_a_compiler_that_fails_is_named(fresh, monkeypatch, tmp_path):
    fake = tmp_path / "fake"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit\necho no such option >&2\nexit 3\n')
    fake.chmod(0o755)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: str(fake))
    library = compiled_library()
    assert library.functions is None
    assert str(fake) in library.problem
    assert "no such option" in library.problem
    assert list(fresh.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(fresh, monkeypatch):
    fresh.parent.mkdir()
    fresh.write_text("a file where the folder should be")
    library = compiled_library()
    assert library.functions is None
    assert str(fresh) in library.problem


def test_a_damaged_library_is_made_again(fresh):
    if compiled_library().functions is None:
        pytest.skip(compiled_library().problem)
    (file,) = fresh.iterdir()
    file.unlink()
    file.write_bytes(b"not a library")
    compiled_library.cache_clear()
    assert compiled_library().functions is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_only_the_dtypes_that_were_compiled(dtype):
    if compiled_library().functions is None:
        pytest.skip(compiled_library().problem)
    x = torch.ones(3, dtype=dtype)
    assert runs_compiled(x) == (dtype in (torch.float32, torch.bfloat16))
    with references_only():
        assert not runs_compiled(x)
    assert not runs_compiled(x.to("meta"))


def test_other_than_tensors_take_the_references():
    x = torch.randn(4, 8)
    with FakeTensorMode():
        assert swiglu(torch.empty(4, 8), torch.empty(4, 8)).shape == (4, 8)
    graph = make_fx(lambda gate: swiglu(gate, gate))(x)
    assert_close(graph(2 * x), swiglu(2 * x, 2 * x), 1e-6)
    mapped = torch.func.vmap(lambda gate: torch.nn.functional.silu(gate) * gate)(x)
    assert_close(torch.func.vmap(lambda gate: swiglu(gate, gate))(x), mapped, 1e-6)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_default_device_means_nothing(device):
    x, weight = torch.randn(4, 8), torch.ones(8)
    expected = rms_norm(x, weight, 1e-5)[0]
    with torch.device(device):
        assert torch.equal(rms_norm(x, weight, 1e-5)[0], expected)


def test_autocast_changes_nothing():
    def step():
        x = torch.linspace(-1, 1, 40).view(5, 8).requires_grad_()
        pair = torch.ones(2, 8), torch.ones(6, 2)
        (y,) = lora_linear(Recomputable(x), [torch.ones(6, 8)], [None], [LoraRange(0, 5, (pair,), (2.0,))])
        y.sum().backward()
        return y, x.grad

    expected = step()
    with torch.autocast("cpu", torch.bfloat16):
        found = step()
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    """Of the compiled parts; several slices of rows, several adapters."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x, w = draw(700, 40).to(dtype), torch.zeros(24, 40, dtype=dtype)
    ranges = [LoraRange(a, b, ((draw(3, 40), draw(24, 3)),), (0.5,)) for a, b in ((0, 20), (20, 690))]
    q, k, v = draw(700, 4, 16).to(dtype), draw(700, 2, 16).to(dtype), draw(700, 2, 16).to(dtype)
    router = draw(5, 40)

    def everything():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, q, k, v, router)]
        own_x, own_q, own_k, own_v, own_router = leaves
        pairs = [tuple(factor.detach().requires_grad_() for factor in part.factors[0]) for part in ranges]
        own = [LoraRange(part.start, part.end, (pair,), (0.5,)) for part, pair in zip(ranges, pairs, strict=True)]
        outputs = [
            *lora_linear(Recomputable(own_x), [w], [None], own),
            wide_linear(Recomputable(own_x), own_router),
            causal_attention(own_q, own_k, own_v, [0, 3, 300, 700]),
            rms_norm(own_x, torch.ones(40, dtype=dtype), 1e-5)[0],
            swiglu(own_x, own_x),
        ]
        sum((output.float() ** 2).sum() for output in outputs).backward()
        return [*outputs, *(leaf.grad for leaf in leaves), *(factor.grad for pair in pairs for factor in pair)]

    alone = everything()
    torch.set_num_threads(3)
    for actual, expected in zip(everything(), alone, strict=True):
        assert torch.equal(actual, expected)


def test_memory_that_is_not_there_is_a_python_error():
    if compiled_library().functions is None:
        pytest.skip(compiled_library().problem)
    code = (
        "import resource, torch; from moe_peft.kernels.causal_attention.op import causal_attention as run;"
        "torch.set_num_threads(1); q = torch.zeros(200_000, 1, 1); run(q[:9], q[:9], q[:9], [0, 9]);"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096;"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 40_000_000, -1));"
        "run(q, q, q, [0, 200_000])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("MemoryError: not enough memory for causal_attention_forward")


def test_without_a_home_there_is_no_library(fresh, monkeypatch):
    for name in ("MOE_PEFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    problem = compiled_library().problem
    assert "Could not determine home directory" in problem or "no C++ compiler" in problem
    assert not runs_compiled(torch.ones(3))


@pytest.mark.skipif(sys.platform != "linux", reason="made for Linux's permissions")
def test_what_others_may_write_is_not_loaded(fresh):
    if compiled_library().functions is None:
        pytest.skip(compiled_library().problem)
    (file,) = fresh.iterdir()
    fresh.chmod(0o777)
    compiled_library.cache_clear()
    library = compiled_library()
    assert library.functions is None
    assert f"{fresh} belongs to another user, or others may write it" in library.problem
    assert file.is_file()


def test_a_library_that_never_loads_is_compiled_once(fresh, monkeypatch):
    if compiled_library().functions is None:
        pytest.skip(compiled_library().problem)
    for file in fresh.iterdir():
        file.unlink()
    monkeypatch.setattr(compiled.ctypes, "CDLL", Mock(side_effect=OSError("failed to map segment")))
    compiled_library.cache_clear()
    assert "failed to map segment" in compiled_library().problem
    monkeypatch.setattr(compiled, "_compile", lambda *args: pytest.fail("compiled again"))
    compiled_library.cache_clear()
    assert "failed to map segment" in compiled_library().problem
    assert not compiled.needs_compiling()


def test_a_compiler_that_hangs_is_ended(fresh, monkeypatch, tmp_path):
    fake = tmp_path / "fake"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit\nexec sleep 1000\n')
    fake.chmod(0o755)
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(compiled.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    monkeypatch.setattr(compiled.shutil, "which", lambda name: str(fake))
    monkeypatch.setattr(compiled, "_COMPILER_SECONDS", 1)
    assert "made nothing that loads" in compiled_library().problem
    assert started
    assert all(process.poll() is not None for process in started)


def test_an_installed_package_has_the_sources(tmp_path):
    project = Path(compiled.__file__).parents[1]
    if not (project / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    settings = project.joinpath("pyproject.toml").read_text(encoding="utf-8")
    assert '"*" = ["*.cpp", "*.h"]' in settings
    folders = {file.parent for pattern in ("**/*.cpp", "**/*.h") for file in (project / "kernels").glob(pattern)}
    for folder in folders:
        package = ".".join(["moe_peft", *folder.relative_to(project).parts])
        assert f'"{package}"' in settings
