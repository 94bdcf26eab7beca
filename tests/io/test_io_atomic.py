"""Atomic writes: complete, or as if nothing had happened."""

import errno
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from moe_peft.io.atomic import (
    atomic_folder,
    check_free,
    safetensors_size,
    save_safetensors_atomically,
    write_bytes_atomically,
    write_text_atomically,
)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "new" / "note.txt"
    write_text_atomically(path, "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    write_bytes_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names_in(path.parent) == ["note.txt"]


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    (tmp_path / "plain").touch()
    write_text_atomically(tmp_path / "text", "x")
    save_safetensors_atomically(tmp_path / "tensors", {"a": torch.zeros(2)})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "text", "tensors")}
    assert len(modes) == 1


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text_atomically(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16]
DTYPES += [torch.int32, torch.float32, torch.float64, torch.int64]


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "naïve": 'a "word"'}])
@pytest.mark.parametrize("count", [0, 1, 5, 43])
def test_the_size_of_a_safetensors_file_is_known_beforehand(tmp_path, count, metadata):
    tensors = {f"größe.{i % 7}.{i}": torch.zeros(i * 5 % 13, i, dtype=DTYPES[i * 3 % 10]) for i in range(count)}
    save_safetensors_atomically(tmp_path / "file", tensors, metadata)
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert safetensors_size(meta, metadata) == (tmp_path / "file").stat().st_size


def test_safetensors_round_trip_with_views_and_metadata(tmp_path):
    stack = torch.arange(24.0).view(3, 2, 4)
    tensors = {"first": stack[0], "last": stack[2], "strided": stack[:, 0].T, "half": torch.ones(3).bfloat16()}
    save_safetensors_atomically(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_safetensors_atomically(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def half_a_file(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half_a_file)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors_atomically(path, {"a": torch.zeros(2)})
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of POSIX")
def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    import resource

    path = tmp_path / "a.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match="too large") as refusal:
            save_safetensors_atomically(path, {"a": torch.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert (refusal.value.errno, refusal.value.filename) == (errno.EFBIG, str(path))
    assert names_in(tmp_path) == []


def test_another_failure_of_safetensors_is_told_in_its_words(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise safetensors.SafetensorError("something odd")

    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    with pytest.raises(OSError, match=r"a\.safetensors could not be written: something odd"):
        save_safetensors_atomically(tmp_path / "a.safetensors", {"a": torch.ones(2)})


def test_what_could_not_be_made_is_known_beforehand(tmp_path):
    (tmp_path / "file").touch()
    check_free(tmp_path / "new" / "deep")
    long = "ä" * 120  # 240 bytes, which a name may have
    check_free(tmp_path / long)
    with atomic_folder(tmp_path / long):
        pass
    with pytest.raises(NotADirectoryError, match="file is a file: it cannot hold the folder"):
        check_free(tmp_path / "file" / "deep" / "sub")
    for path in (tmp_path / ("ä" * 130), tmp_path / "new" / ("x" * 256), tmp_path / ("x" * 256) / "deep"):
        with pytest.raises(ValueError, match="cannot be made: File name too long"):
            check_free(path)
    assert names_in(tmp_path) == ["file", long]


def test_folder_appears_whole_or_not_at_all(tmp_path):
    with atomic_folder(tmp_path / "deep" / "step-1") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.json").write_text("{}")
        assert not (tmp_path / "deep" / "step-1").exists()
    assert (tmp_path / "deep" / "step-1" / "sub" / "a.json").read_text() == "{}"

    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "deep" / "step-2") as folder:
        (folder / "a.json").write_text("{}")
        raise RuntimeError
    assert names_in(tmp_path / "deep") == ["step-1"]


def test_folder_in_the_way(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    with atomic_folder(target) as folder:  # an empty folder is no obstacle
        (folder / "old").touch()
    with pytest.raises(FileExistsError, match="not empty"), atomic_folder(target):
        raise AssertionError("must not be entered")
    with pytest.raises(RuntimeError), atomic_folder(target, replace=True):
        raise RuntimeError
    assert names_in(target) == ["old"]
    with atomic_folder(target, replace=True) as folder:
        (folder / "new").touch()
    assert names_in(target) == ["new"]
    assert names_in(tmp_path) == ["run"]

    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"), atomic_folder(tmp_path / "file", replace=True):
        raise AssertionError("must not be entered")


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_safetensors_atomically(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    script = textwrap.dedent("""
        import os, signal, sys
        import safetensors.torch, torch
        from moe_peft.io.atomic import save_safetensors_atomically
        save = safetensors.torch.save_file
        def killed_while_saving(tensors, partial, metadata):
            save(tensors, partial, metadata=metadata)
            os.truncate(partial, 20)
            os.kill(os.getpid(), signal.SIGKILL)
        safetensors.torch.save_file = killed_while_saving
        save_safetensors_atomically(sys.argv[1], {"a": torch.zeros(2)})
    """)
    result = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert path.read_bytes() == before


KILLED_AT_A_RENAME = """
import os, pathlib, sys
from moe_peft.io import atomic
count = 0
def killer(act):
    def acting(*arguments):
        global count
        count += 1
        if count == int(sys.argv[2]):
            os._exit(9)
        return act(*arguments)
    return acting
atomic._exchange = killer(atomic._exchange)
pathlib.Path.rename = killer(pathlib.Path.rename)
atomic.shutil.rmtree = killer(atomic.shutil.rmtree)
with atomic.atomic_folder(sys.argv[1], replace=True) as partial:
    (partial / "file").write_text("new")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps two folders in one step")
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_kill_while_folders_change_places_leaves_one_of_them(tmp_path, step):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "file").write_text("old")
    subprocess.run([sys.executable, "-c", KILLED_AT_A_RENAME, str(target), str(step)], check=False)
    assert (target / "file").read_text() == ("old" if step == 1 else "new")
