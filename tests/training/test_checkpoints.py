"""The folders of checkpoints: what comes back, what a damaged one is taken for, what a full disk leaves."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_peft.training.folder.checkpoints import Checkpoint, Checkpoints


def refuse_warning(text: str) -> None:
    raise AssertionError(text)


def tensors() -> dict[str, Tensor]:
    """Views of one storage, a scalar, integers, and a transposed matrix."""
    whole = torch.arange(12.0)
    return {
        "a": whole[:6].view(2, 3),
        "b": whole[6:],
        "whole": whole,
        "step": torch.tensor(3.0),
        "counts": torch.tensor([[1, 2]]),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }


def newest(checkpoints: Checkpoints) -> Checkpoint:
    found = checkpoints.newest_intact(refuse_warning)
    assert found is not None
    return found


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest_intact(refuse_warning) is None
    state = {"fused_step": 7, "words": "ü\n", "number": 0.1, "none": None}
    path = checkpoints.write(7, state, {"qa": tensors(), "state": {}}, keep=2)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    found = newest(checkpoints)
    assert (found.path, found.state) == (path, state)
    assert found.tensors("state") == {}
    read = found.tensors("qa")
    assert read.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_the_newest_are_kept_and_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (9, 10, 100_000_000, 100_000_001):
        checkpoints.write(step, {"step": step}, {}, keep=2)
    assert [path.name for path in checkpoints.paths] == ["step-100000001", "step-100000000"]
    checkpoints.write(100_000_001, {"step": "again"}, {}, keep=2)
    assert newest(checkpoints).state == {"step": "again"}
    assert len(checkpoints.paths) == 2


def test_damaged_ones_are_told_of_and_removed_with_what_was_half_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 5):
        checkpoints.write(step, {"step": step}, {"qa": tensors()}, keep=9)
    first, second, third, fourth = reversed(checkpoints.paths)
    (fourth / "manifest.json").write_text("{")
    weights = third / "qa.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "checkpoints" / ".step-00000005.0123.partial").mkdir()
    (tmp_path / "checkpoints" / "mine").mkdir()
    warnings: list[str] = []
    found = checkpoints.newest_intact(warnings.append)
    assert found is not None
    assert found.path == second
    assert len(warnings) == 2
    assert f"{fourth} is damaged (" in warnings[0]
    assert f"{third} is damaged (qa.safetensors has {weights.stat().st_size:,} bytes instead of " in warnings[1]
    checkpoints.remove_after(found)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["mine", first.name, second.name]
    checkpoints.remove_after(None)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["mine"]


@contextmanager
def little_room(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: a real error of the system, where a full disk would need a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("large", ["tensors", "state"])
def test_what_cannot_be_written_leaves_the_one_before_alone(large: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, {"step": 1}, {"qa": tensors()}, keep=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    state = {"words": "x" * 10_000 if large == "state" else ""}
    weights = {"w": torch.zeros(10_000 if large == "tensors" else 1)}
    with little_room(5_000), pytest.raises(OSError, match=r"qa.safetensors could not be written|File too large"):
        checkpoints.write(2, state, {"qa": weights}, keep=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert newest(checkpoints).state == {"step": 1}
