"""AdaLoRA: low-rank updates as singular value decompositions, whose ranks a shrinking budget allots.

https://arxiv.org/abs/2303.10512. Letters: I input features, O output features, R rank.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from moe_peft import strict
from moe_peft.adapters.layer_patterns import check_layers, chosen_layers, layers_of_folder
from moe_peft.adapters.lora import (
    ALL_LINEAR,
    PROJECTIONS,
    check_targets,
    check_update,
    chosen_projections,
    last_names,
    module_path,
    peft_prefix,
    target_linears,
    whole,
)
from moe_peft.adapters.method import Method, NamedWeight, Updates, check_size
from moe_peft.adapters.rank_allocator import FACTORS, AdaLora, RankAllocator
from moe_peft.model.draws import generator_for
from moe_peft.model.linear import Linear, wide_dtype

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

_STEPS_OF_NO_RUN = 1000  # PEFT refuses a folder without a schedule's length, which no run has given yet
_MASK = ".rank_mask"  # behind a projection's checkpoint prefix


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(Method):
    """Settings of an AdaLoRA adapter, spelled as PEFT spells them.

    Raises:
        ValueError: on a value outside its rule, an unknown target module, or a schedule without room for allocations.
    """

    init_r: int = field(default=12, metadata={"help": "rank of every projection at the start"})
    target_r: int = field(default=8, metadata={"help": "mean rank at the end, at most init_r"})
    lora_alpha: float = field(default=16, metadata={"help": "the update is scaled by lora_alpha / init_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the update's input, in training only"})
    target_modules: str | tuple[str, ...] = field(
        default=ALL_LINEAR, metadata={"help": f"'{ALL_LINEAR}' or a list of {', '.join(PROJECTIONS)}"}
    )
    tinit: int = field(default=0, metadata={"help": "optimizer steps before ranks are pruned"})
    tfinal: int = field(default=0, metadata={"help": "optimizer steps at the end, after the last pruning"})
    deltaT: int = field(default=1, metadata={"help": "optimizer steps from one pruning to the next"})  # noqa: N815
    beta1: float = field(default=0.85, metadata={"help": "smoothing of the importance, between 0 and 1"})
    beta2: float = field(default=0.85, metadata={"help": "smoothing of its uncertainty, between 0 and 1"})
    orth_reg_weight: float = field(
        default=0.5, metadata={"help": "coefficient of the penalty that keeps singular vectors orthogonal"}
    )
    total_step: int | None = field(
        default=None, metadata={"help": "optimizer steps of the schedule; null: those of the run"}
    )
    layers_to_transform: int | tuple[int, ...] | None = field(
        default=None, metadata={"help": "the layer, or list of layers, counted from 0, to adapt; null: all"}
    )
    rank_pattern: dict[str, tuple[bool, ...]] | None = field(
        default=None, metadata={"help": "which of the init_r ranks of a projection are left, as a saved adapter has it"}
    )

    peft_type: ClassVar[str] = "ADALORA"
    resizes: ClassVar[bool] = True  # the averages, which end with the last allocation

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("init_r", "target_r"):
            check_size(name, getattr(self, name))
        for name, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.target_r > self.init_r:
            raise ValueError(f"target_r={self.target_r} must be at most init_r={self.init_r}")
        check_update(self.lora_alpha, self.lora_dropout)
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1")
        if self.orth_reg_weight < 0:
            raise ValueError(f"orth_reg_weight={self.orth_reg_weight} must be at least 0")
        if self.total_step is not None and self.total_step <= self.tinit + self.tfinal:
            raise ValueError(
                f"total_step={self.total_step} must be above tinit={self.tinit} plus tfinal={self.tfinal}: "
                "there is no step left on which ranks are pruned"
            )
        for name, kept in (self.rank_pattern or {}).items():
            if len(kept) != self.init_r:
                raise ValueError(f"rank_pattern[{name!r}] has {len(kept)} entries, not init_r={self.init_r}")
        check_targets(self.target_modules)
        check_layers(self.layers)

    @property
    def targets(self) -> tuple[str, ...]:
        """The target projections, in the model's order."""
        return chosen_projections(self.target_modules)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers that get the adapter; None: all of them."""
        return chosen_layers(self.layers_to_transform)

    @property
    def scaling(self) -> float:
        """Factor of the product, the same whatever ranks are left; with PEFT's guard against a division by zero."""
        return self.lora_alpha / (self.init_r + 1e-5)

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put a fresh decomposition on every target projection of every layer."""
        check_layers(self.layers, len(model.decoder_layers))
        sites = list(target_linears(model, self.targets, self.layers))
        known = {_pattern_name(layer_idx, projection) for layer_idx, projection, _ in sites}
        for key in self.rank_pattern or {}:
            if key not in known:
                raise ValueError(f"rank_pattern names {key!r}, which is no target{strict.did_you_mean(key, known)}")
        for layer_idx, projection, linear in sites:
            linear.loras_[name] = self._new_lora(linear, seed, name, layer_idx, projection)

    def _new_lora(self, linear: Linear, seed: int, name: str, layer_idx: int, projection: str) -> AdaLora:
        """Small random vectors and singular values of zero, as PEFT draws them."""
        generator = generator_for(seed, name, "init", layer_idx, projection)
        base = linear.base_layer_.weight
        rank = self._rank(layer_idx, projection)
        lora_a = torch.empty(rank, linear.in_features, dtype=wide_dtype(base.dtype)).normal_(
            0, 0.02, generator=generator
        )
        lora_b = torch.empty(linear.out_features, rank, dtype=lora_a.dtype).normal_(0, 0.02, generator=generator)
        lora_e = torch.zeros(rank, 1, dtype=lora_a.dtype)
        lora_a, lora_e, lora_b = (factor.to(base.device) for factor in (lora_a, lora_e, lora_b))
        return AdaLora(lora_a, lora_e, lora_b, scaling=self.scaling, dropout=self.lora_dropout, seed=seed)

    def _rank(self, layer_idx: int, projection: str) -> int:
        """How many of the ``init_r`` ranks a projection has."""
        pattern = self._pattern(layer_idx, projection)
        return self.init_r if pattern is None else sum(pattern)

    def _pattern(self, layer_idx: int, projection: str) -> tuple[bool, ...] | None:
        """Which of them; None: all."""
        return (self.rank_pattern or {}).get(_pattern_name(layer_idx, projection))

    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """PEFT's checkpoint names with the parameter that holds each weight."""
        for layer_idx, projection, lora in self._loras(model, name):
            for factor in FACTORS:
                yield f"{peft_prefix(layer_idx, projection)}.{factor}", getattr(lora, factor), None

    def named_buffers(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Tensor]]:
        """Which ranks are masked, and the moving averages of an adapter in training."""
        yield from self.saved_buffers(model, name)
        for layer_idx, projection, lora in self._loras(model, name):
            for key, average in lora.averages():
                yield f"{peft_prefix(layer_idx, projection)}.{key}", average

    def saved_buffers(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Tensor]]:
        """Which ranks are masked."""
        for layer_idx, projection, lora in self._loras(model, name):
            yield f"{peft_prefix(layer_idx, projection)}{_MASK}", lora.rank_mask_

    def penalty(self, model: "LlamaForCausalLM", name: str) -> Tensor | None:
        """``orth_reg_weight`` times the mean Frobenius norm of ``A A^T - 1`` and ``B^T B - 1`` over all projections."""
        if self.orth_reg_weight == 0:
            return None
        by_rank: dict[int, list[Tensor]] = {}
        for _, _, lora in self._loras(model, name):
            grams = (lora.lora_A @ lora.lora_A.mT, lora.lora_B.mT @ lora.lora_B)
            by_rank.setdefault(lora.lora_E.shape[0], []).extend(grams)
        norms = [
            torch.linalg.matrix_norm(torch.stack(grams) - torch.eye(rank, dtype=grams[0].dtype, device=grams[0].device))
            for rank, grams in by_rank.items()
        ]
        return self.orth_reg_weight * torch.cat(norms).mean()

    def updates(self, model: "LlamaForCausalLM", name: str, num_steps: int) -> Updates | None:
        """The allocation of ranks behind each step; none where there is nothing to prune.

        Raises:
            ValueError: when the schedule does not fit the run's steps.
        """
        loras = [lora for _, _, lora in self._loras(model, name)]
        if sum(lora.lora_E.shape[0] for lora in loras) <= self.target_r * len(loras):
            return None
        if self.tinit + self.tfinal >= num_steps:
            raise ValueError(
                f"tinit={self.tinit} plus tfinal={self.tfinal} must be below the run's {num_steps} optimizer steps: "
                "there is no step left on which ranks are pruned"
            )
        if self.total_step is not None and self.total_step > num_steps:
            raise ValueError(
                f"total_step={self.total_step} must be at most the run's {num_steps} optimizer steps: "
                "the ranks would never come down to target_r"
            )
        return RankAllocator(
            loras,
            target_r=self.target_r,
            tinit=self.tinit,
            tfinal=self.tfinal,
            deltaT=self.deltaT,
            beta1=self.beta1,
            beta2=self.beta2,
            total_step=self.total_step or num_steps,
        )

    def on_few_layers(self, num_layers: int) -> "AdaLoraConfig":
        """Every layer with the mean rank of all, a layer that is left out counting as none."""
        ranks = [
            self._rank(layer, projection) for layer in self.layers or range(num_layers) for projection in self.targets
        ]
        rank = max(1, math.ceil(sum(ranks) / (num_layers * len(self.targets))))
        return dataclasses.replace(
            self, init_r=rank, target_r=min(self.target_r, rank), rank_pattern=None, layers_to_transform=None
        )

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Without what PEFT inherits from LoRA and AdaLoRA does not look at."""
        own = {key: value for key, value in data.items() if key not in ("r", "init_lora_weights")}
        layers = layers_of_folder(own, module_path(0, PROJECTIONS[0]))
        targets = last_names(own.get("target_modules", ALL_LINEAR))
        return {**own, "layers_to_transform": layers, "target_modules": targets}

    def to_peft(self, model: "LlamaForCausalLM", name: str) -> dict[str, Any]:
        """With the ranks that are left, and a ``total_step``, which PEFT asks for."""
        trained_for = next((lora.total_step_ for _, _, lora in self._loras(model, name)), None)
        return {
            **dataclasses.asdict(self),
            "lora_alpha": whole(self.lora_alpha),
            "target_modules": list(self.targets),
            "total_step": self.total_step or trained_for or self.tinit + self.tfinal + _STEPS_OF_NO_RUN,
            "rank_pattern": self._ranks_left(model, name),
        }

    def _ranks_left(self, model: "LlamaForCausalLM", name: str) -> dict[str, list[bool]] | None:
        """``init_r`` booleans of every projection; None where nothing has been pruned."""
        kept_of = [
            (layer_idx, projection, lora.kept_ranks()) for layer_idx, projection, lora in self._loras(model, name)
        ]
        if all(len(kept) == self.init_r for _, _, kept in kept_of):
            return None
        found = {}
        for layer_idx, projection, kept in kept_of:
            pattern = self._pattern(layer_idx, projection)
            there = [place for place in range(self.init_r) if pattern is None or pattern[place]]
            left = {there[rank] for rank in kept}
            found[_pattern_name(layer_idx, projection)] = [place in left for place in range(self.init_r)]
        return found

    def to_saved(self, model: "LlamaForCausalLM", name: str) -> dict[str, Tensor]:
        """The factors without the ranks that are pruned."""
        state = {}
        for layer_idx, projection, lora in self._loras(model, name):
            prefix, kept = peft_prefix(layer_idx, projection), lora.kept_ranks()
            state[f"{prefix}.lora_A"] = lora.lora_A.detach()[kept]
            state[f"{prefix}.lora_E"] = lora.lora_E.detach()[kept]
            state[f"{prefix}.lora_B"] = lora.lora_B.detach()[:, kept]
        return state

    def from_saved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """None of the ranks that were saved is masked.

        Raises:
            ValueError: on singular values without a rank, or a mask, which no folder holds.
        """
        for key in weights:
            if key.endswith(_MASK):
                raise ValueError(f"{key} must not be there: the ranks that are saved are those that are not masked")
        values = {key: value for key, value in weights.items() if key.endswith(".lora_E")}
        for key, value in values.items():
            if value.dim() != 2:
                raise ValueError(f"{key} has shape {list(value.shape)}, but must have [R, 1]")
        masks = {
            f"{key.removesuffix('.lora_E')}{_MASK}": torch.ones(value.shape[0], dtype=torch.bool)
            for key, value in values.items()
        }
        return {**weights, **masks}

    def _loras(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[int, str, AdaLora]]:
        for layer_idx, projection, linear in target_linears(model, self.targets, self.layers):
            yield layer_idx, projection, linear.loras_[name]


def _pattern_name(layer_idx: int, projection: str) -> str:
    """What PEFT calls a projection's singular values in a ``rank_pattern``."""
    return f"{module_path(layer_idx, projection)}.lora_E"
