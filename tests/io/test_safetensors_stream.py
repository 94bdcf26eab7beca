"""Files written a tensor at a time are what the safetensors library would read back."""

import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moe_peft.io.safetensors_stream import TensorPlan, write_safetensors


def plan_of(name, tensor):
    return TensorPlan(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)


def test_every_dtype_and_shape_is_read_back(tmp_path):
    tensors = {
        "odd": torch.randn(3, 5).half(),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "brain": torch.randn(7).bfloat16(),
        "turned": torch.randn(4, 6).T,
        "view": torch.randn(9, 4)[2:5],
        "one": torch.randn(()),
        "nothing": torch.empty(0, 3),
        "naïve": torch.tensor([float("nan"), float("inf")]),
    }
    plans = [plan_of(name, tensor) for name, tensor in tensors.items()]
    write_safetensors(tmp_path / "x.safetensors", plans, tensors.values(), {"format": "pt"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].nan_to_num(1.5), tensor.nan_to_num(1.5)), name
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header_size = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    assert header_size % 8 == 0


def test_a_tensor_is_let_go_before_the_one_behind_the_next_is_made(tmp_path):
    alive = []

    def tensors():
        for i in range(6):
            assert sum(reference() is not None for reference in alive) <= 1
            tensor = torch.full((4, 4), float(i))
            alive.append(weakref.ref(tensor))
            yield tensor
            del tensor

    plans = [plan_of(str(i), torch.empty(4, 4)) for i in range(6)]
    write_safetensors(tmp_path / "x.safetensors", plans, tensors(), {})
    assert [load_file(tmp_path / "x.safetensors")[str(i)][0, 0] for i in range(6)] == list(range(6))


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3), torch.zeros(3, 2).half()], ids=["shape", "dtype"])
def test_what_was_not_planned_is_not_written(tmp_path, tensor):
    with pytest.raises(AssertionError, match="x"):
        write_safetensors(tmp_path / "x", [plan_of("x", torch.zeros(3, 2))], [tensor], {})
