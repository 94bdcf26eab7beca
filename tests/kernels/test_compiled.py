"""The CPU's C++ is compiled once, kept, never half there, and missed by nothing but time where it cannot be made."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import assert_close

from moe_peft.kernels import compiled
from moe_peft.kernels.compiled import compiled_library, references_only, runs_compiled
from moe_peft.kernels.swiglu.op import swiglu

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
