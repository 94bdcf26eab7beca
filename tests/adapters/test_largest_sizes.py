"""Sizes that no adapter has are refused by every config that takes one, before anything is made of them."""

from typing import Any

import pytest
import torch
from builders import tiny_model

from moe_peft.adapters import METHODS
from moe_peft.adapters.adaptive_lora import AdaptiveLoraConfig
from moe_peft.adapters.method import LARGEST_SIZE, Method
from moe_peft.adapters.rank_growth import Growth
from moe_peft.io.base_model import BaseModelShape, without_memory
from moe_peft.strict import build

SIZES: list[tuple[str, str, dict[str, Any]]] = [
    *((name, "r", {}) for name in METHODS if hasattr(METHODS[name], "r")),
    ("adaptive_lora", "max_rank", {}),
    ("adalora", "init_r", {}),
    ("adalora", "target_r", {}),
    ("bottleneck", "bottleneck_size", {}),
    ("quantized_lora", "group_size", {}),
    *((name, "num_virtual_tokens", {}) for name in METHODS if hasattr(METHODS[name], "num_virtual_tokens")),
    ("p_tuning", "encoder_hidden_size", {}),
    ("p_tuning", "encoder_num_layers", {"encoder_reparameterization_type": "LSTM"}),
    ("prefix_tuning", "encoder_hidden_size", {"prefix_projection": True}),
]


def test_the_list_is_not_empty_anywhere() -> None:
    assert {"lora", "mixlora", "vera"} <= {name for name, field, _ in SIZES if field == "r"}
    assert {"prompt_tuning", "p_tuning"} <= {name for name, field, _ in SIZES if field == "num_virtual_tokens"}


@pytest.mark.parametrize("size", [LARGEST_SIZE + 1, 10**9, 10**20, 10**400])
@pytest.mark.parametrize(("method", "field", "others"), SIZES)
def test_a_size_beyond_the_largest(method: str, field: str, others: dict[str, Any], size: int) -> None:
    with pytest.raises(ValueError, match=rf"^{field}=\d+(\.\.\.)? must be at most \d+$"):
        METHODS[method](**{field: size}, **others)


@pytest.mark.parametrize("size", [10**9, 10**400])
def test_sizes_within_other_values(size: int) -> None:
    with pytest.raises(ValueError, match=r"^rank_pattern\['q_proj'\]=\d+(\.\.\.)? must be at most 65536$"):
        METHODS["lora"](rank_pattern={"q_proj": size})
    with pytest.raises(ValueError, match=r"^ranks=\[4, \d+.* must come to at most 65536 together$"):
        METHODS["hierarchical_lora"](ranks=[4, size])
    with pytest.raises(ValueError, match=r"^expert_lora.r=\d+(\.\.\.)? must be at most 65536$"):
        METHODS["mixlora"](expert_lora={"r": size})


def test_ranks_that_could_grow_beyond_the_largest() -> None:
    with pytest.raises(ValueError, match=r"^max_rank=131072 must be at most 65536$"):
        METHODS["adaptive_lora"](r=LARGEST_SIZE // 2)


def test_a_first_value_that_float32_does_not_hold() -> None:
    with pytest.raises(ValueError, match=r"^d_initial=1e\+300 must be in -3.4\d*e\+38..3.4\d*e\+38, which float32"):
        METHODS["vera"](d_initial=1e300)
    METHODS["vera"](d_initial=torch.finfo(torch.float32).max)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 0}, "growth_history[0].step=0 must be at least 1"),
        ({"step": 10**30}, f"growth_history[0].step={10**30} must be at most {2**53}"),
        ({"ranks": [4, -4]}, "growth_history[0].ranks=-4 must be at least 1"),
        ({"ranks": [4, 10**9]}, "growth_history[0].ranks=1000000000 must be at most 65536"),
        ({"importance": [0.5, -0.5]}, "growth_history[0].importance=-0.5 must be in 0..3.4"),
        ({"importance": [0.5, 1e300]}, "growth_history[0].importance=1e+300 must be in 0..3.4"),
    ],
)
def test_a_growth_that_no_training_gives(changes: dict[str, Any], message: str) -> None:
    growth = {"step": 3, "importance": [0.5, 0.25], "ranks": [4, 8], **changes}
    with pytest.raises(ValueError) as caught:
        build(AdaptiveLoraConfig, {"growth_history": [growth]})
    assert str(caught.value).startswith(message)


def test_a_training_that_overflows_can_still_be_noted() -> None:
    Growth(step=1, importance=(float("inf"), float("nan")), ranks=(2, 2))


@pytest.mark.parametrize(
    "config",
    [
        METHODS["sparse_lora"](r=LARGEST_SIZE),
        METHODS["adalora"](init_r=LARGEST_SIZE),
        METHODS["quantized_lora"](r=LARGEST_SIZE),
    ],
    ids=lambda config: config.peft_type,
)
def test_what_is_only_counted_takes_no_memory(config: Method) -> None:
    """Neither masks nor patterns of it are made; the twin's tensors, all of them, are on the meta device."""
    model = tiny_model()
    twin = BaseModelShape(model.config_, model.dtype, model.device).empty_model()
    with without_memory(), _NoRealTensors():
        twin.add_adapter("qa", config)
    assert all(weight.is_meta for weight in twin.adapter_state("qa").values())


class _NoRealTensors(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.is_meta, f"{func} made a real tensor"
        return result
