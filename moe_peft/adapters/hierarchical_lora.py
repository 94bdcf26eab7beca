"""Hierarchical LoRA: the sum of several low-rank updates of different ranks, each of which can be left out later.

Letters: I input features, O output features, R_l rank of level l.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from moe_peft import strict
from moe_peft.adapters.lora import (
    ALL_LINEAR,
    PROJECTIONS,
    LoraConfig,
    check_targets,
    check_update,
    chosen_projections,
    last_names,
    peft_prefix,
    target_linears,
)
from moe_peft.adapters.method import LARGEST_SIZE, Method, NamedWeight
from moe_peft.model.linear import Linear, LinearAdapter

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

_FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, kw_only=True)
class HierarchicalLoraConfig(Method):
    """Settings of an adapter whose update is a sum of LoRA updates, its levels.

    Raises:
        ValueError: on a value outside its rule, or an unknown target module.
    """

    ranks: tuple[int, ...] = field(default=(16, 8, 4), metadata={"help": "rank of each level's update"})
    lora_alpha: float = field(default=16, metadata={"help": "a level of rank r is scaled by lora_alpha / r"})
    alphas: tuple[float, ...] | None = field(
        default=None, metadata={"help": "an alpha for each level in place of lora_alpha"}
    )
    active_levels: tuple[int, ...] | None = field(
        default=None, metadata={"help": "places in ranks, from 0, of the levels to be there; all of them without it"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the updates' input, in training only"})
    use_rslora: bool = field(default=False, metadata={"help": "scale each level by its alpha / sqrt(r) instead"})
    target_modules: str | tuple[str, ...] = field(
        default=ALL_LINEAR, metadata={"help": f"'{ALL_LINEAR}' or a list of {', '.join(PROJECTIONS)}"}
    )

    peft_type: ClassVar[str] = "HIERARCHICAL_LORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks={list(self.ranks)} must be a list of ranks of at least 1")
        if sum(self.ranks) > LARGEST_SIZE:
            raise ValueError(f"ranks={strict.show(list(self.ranks))} must come to at most {LARGEST_SIZE} together")
        check_update(self.lora_alpha, self.lora_dropout)
        if self.alphas is not None and len(self.alphas) != len(self.ranks):
            raise ValueError(f"alphas={list(self.alphas)} must be as many as ranks={list(self.ranks)}")
        if self.alphas is not None and not all(alpha > 0 and math.isfinite(alpha) for alpha in self.alphas):
            raise ValueError(f"alphas={list(self.alphas)} must all be above 0")
        if self.alphas is not None and self.lora_alpha != LoraConfig().lora_alpha:
            raise ValueError(f"lora_alpha={self.lora_alpha} changes nothing beside alphas={list(self.alphas)}")
        check_targets(self.target_modules)
        self._check_levels()

    def _check_levels(self) -> None:
        if self.active_levels is None:
            return
        levels = list(self.active_levels)
        if not levels or not all(0 <= level < len(self.ranks) for level in levels):
            where = f"0..{len(self.ranks) - 1} of ranks={list(self.ranks)}"
            raise ValueError(f"active_levels={levels} must be a list of places in {where}")
        if levels != sorted(set(levels)):
            raise ValueError(f"active_levels={levels} must name each level once, in rising order")

    @property
    def targets(self) -> tuple[str, ...]:
        """The target projections, in the model's order."""
        return chosen_projections(self.target_modules)

    @property
    def levels(self) -> tuple[int, ...]:
        """The places in ``ranks`` of the levels that are there."""
        return tuple(range(len(self.ranks))) if self.active_levels is None else self.active_levels

    def level(self, index: int) -> LoraConfig:
        """What one level is when it is alone."""
        return LoraConfig(
            r=self.ranks[index],
            lora_alpha=self.lora_alpha if self.alphas is None else self.alphas[index],
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            target_modules=self.target_modules,
        )

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put the levels that are to be there on every target projection of every layer."""
        for layer_idx, projection, linear in target_linears(model, self.targets):
            linear.loras_[name] = self._new_levels(linear, seed, name, layer_idx, projection)

    def _new_levels(self, linear: Linear, seed: int, name: str, layer_idx: int, projection: str) -> "LevelledLora":
        levels = {}
        for index in self.levels:
            config = self.level(index)
            # Its own draws, which are the same whichever other levels there are.
            factors = config.initial_factors(linear, (), seed, f"{name}.levels.{index}", layer_idx, projection)
            levels[index] = (*factors, config.scaling)
        return LevelledLora(levels, dropout=self.lora_dropout, seed=seed)

    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """The factors of each level, such as ``...q_proj.levels.0.lora_A.weight``."""
        for layer_idx, projection, linear in target_linears(model, self.targets):
            for index, level in zip(self.levels, linear.loras_[name].levels_, strict=True):
                for factor in _FACTORS:
                    key = f"{peft_prefix(layer_idx, projection)}.{_level_part(index)}{factor}.weight"
                    yield key, getattr(level, factor), None

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Targets may be dotted suffixes, as in PEFT's own folders."""
        return {**data, "target_modules": last_names(data.get("target_modules", ALL_LINEAR))}

    def to_peft(self, model: "LlamaForCausalLM", name: str) -> dict[str, Any]:
        """With every target by its name."""
        return {**super().to_peft(model, name), "target_modules": list(self.targets)}

    def from_saved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the levels that are not to be there."""
        absent = tuple(f".{_level_part(index)}" for index in range(len(self.ranks)) if index not in self.levels)
        return {key: weight for key, weight in weights.items() if not any(part in key for part in absent)}


def _level_part(index: int) -> str:
    """What of a weight's checkpoint name is its level's."""
    return f"levels.{index}."


class Level(nn.Module):
    """One level's factors: ``lora_A`` ``[R_l, I]``, ``lora_B`` ``[O, R_l]``."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling_ = scaling


class LevelledLora(LinearAdapter):
    """Several factor pairs on one projection: ``delta = sum of scaling_l * lora_B_l lora_A_l``.

    Args:
        levels: ``lora_A`` ``[R_l, I]``, ``lora_B`` ``[O, R_l]`` and the factor of their product, by level.
        dropout: probability of zeroing a feature of the input during training, the same for all levels.
        seed: of the adapter's draws.
    """

    def __init__(self, levels: Mapping[int, tuple[Tensor, Tensor, float]], *, dropout: float, seed: int) -> None:
        # One product over all ranks has one scaling: each level's own is in its B.
        super().__init__(scaling=1.0, dropout=dropout, seed=seed)
        self.levels_ = nn.ModuleList(Level(*levels[index]) for index in levels)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """All levels' factors behind one another, ``[sum R_l, I]`` and ``[O, sum R_l]``."""
        levels = cast(list[Level], list(self.levels_))
        lora_a = torch.cat([level.lora_A for level in levels])
        lora_b = torch.cat([level.scaling_ * level.lora_B for level in levels], dim=1)
        return lora_a, lora_b
