"""Adaptive rank: a LoRA that gives its most active layers more rank while it trains.

Letters: L layers.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from moe_peft.adapters.base_inits import alpha_at_rank
from moe_peft.adapters.layer_patterns import value_at
from moe_peft.adapters.lora import PLAIN_INITS, LoraConfig, module_path
from moe_peft.adapters.method import Updates, check_size
from moe_peft.adapters.rank_growth import GrowingLora, GrowingPair, Growth, LayerGrowth, RankGrowth
from moe_peft.model.linear import Linear

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

_NEVER = 1 << 40  # optimizer steps


@dataclass(frozen=True, kw_only=True)
class AdaptiveLoraConfig(LoraConfig):
    """Settings of a LoRA adapter whose layers double their ranks where gradients are largest.

    Raises:
        ValueError: on a value outside its rule.
    """

    max_rank: int | None = field(
        default=None, metadata={"help": "largest rank, r times a power of two; null: four times r"}
    )
    grow_every: int = field(default=100, metadata={"help": "optimizer steps from one growth to the next"})
    grow_share: float = field(
        default=0.25, metadata={"help": "share of the layers that grow, those with the largest gradients, in (0, 1]"}
    )
    growth_history: tuple[Growth, ...] = field(
        default=(), metadata={"help": "importance and ranks of the layers at each growth, as a saved adapter has it"}
    )

    resizes: ClassVar[bool] = True
    inits: ClassVar[tuple[str, ...]] = PLAIN_INITS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("max_rank", self.largest_rank)
        quotient, rest = divmod(self.largest_rank, self.r)
        if rest or quotient & (quotient - 1) or not quotient:
            raise ValueError(f"max_rank={self.max_rank} must be r={self.r} times a power of two: ranks double")
        if self.grow_every < 1:
            raise ValueError(f"grow_every={self.grow_every} must be at least 1")
        if not 0.0 < self.grow_share <= 1.0:
            raise ValueError(f"grow_share={self.grow_share} must be in (0, 1]")
        for key, rank in self.rank_pattern.items():
            if rank > self.largest_rank:
                raise ValueError(f"rank_pattern[{key!r}]={rank} must be at most max_rank={self.largest_rank}")

    @property
    def largest_rank(self) -> int:
        """What ``max_rank`` means."""
        return 4 * self.r if self.max_rank is None else self.max_rank

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """As LoRA, and what each layer's growth is noted in, on the first of its projections.

        Raises:
            ValueError: as LoRA, and on a history of another number of layers.
        """
        super().attach(model, name, seed, tokenizer)
        layers = self._layers_of(model, name)
        for growth in self.growth_history:
            if not len(growth.importance) == len(growth.ranks) == len(layers):
                raise ValueError(f"growth_history has {len(growth.ranks)} layers, but the adapter is on {len(layers)}")
        for place, pairs in enumerate(layers):
            pairs[0].lora.growth_ = LayerGrowth(
                [growth.step for growth in self.growth_history],
                [growth.importance[place] for growth in self.growth_history],
                [growth.ranks[place] for growth in self.growth_history],
                pairs[0].lora.lora_A.device,
            )

    def at(self, layer_idx: int, projection: str) -> "AdaptiveLoraConfig":
        """As LoRA's; the rank may be any, however it came to be."""
        path = module_path(layer_idx, projection)
        rank = value_at(self.rank_pattern, path, self.r)
        alpha = value_at(self.alpha_pattern, path, self.lora_alpha)
        return self._with_rank(rank, lora_alpha=alpha)

    def _with_rank(self, rank: int, **changes: Any) -> "AdaptiveLoraConfig":
        return dataclasses.replace(
            self, r=rank, max_rank=rank, rank_pattern={}, alpha_pattern={}, growth_history=(), **changes
        )

    def new_lora(self, linear: Linear, seed: int, name: str, layer_idx: int, projection: str) -> GrowingLora:
        """Factors as LoRA's."""
        lora_a, lora_b = self.initial_factors(linear, (), seed, name, layer_idx, projection)
        return GrowingLora(lora_a, lora_b, scaling=self.scaling, dropout=self.lora_dropout, seed=seed)

    def _layers_of(self, model: "LlamaForCausalLM", name: str) -> list[list[GrowingPair]]:
        """The factor pairs of each adapted layer."""

        def pair(layer_idx: int, projection: str, linear: Linear) -> GrowingPair:
            lora = linear.loras_[name]
            return GrowingPair(lora, partial(self._new_rows, linear, lora.seed_, name, layer_idx, projection))

        layers = itertools.groupby(self.adapted(model), key=lambda at: at[0])
        return [[pair(*at) for at in group] for _, group in layers]

    def _new_rows(self, linear: Linear, seed: int, name: str, layer_idx: int, projection: str, rank: int) -> Tensor:
        """As many rows of A as there are, drawn as the first ones were."""
        place = f"{projection} from rank {rank} on"
        return self._with_rank(rank).initial_factors(linear, (), seed, name, layer_idx, place)[0]

    def named_buffers(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Tensor]]:
        """What each layer's growth is noted in."""
        for layer_idx, growth in self._growths(model, name):
            for key, buffer in growth.named_buffers():
                yield f"layers.{layer_idx}.growth.{key.removesuffix('_')}", buffer

    def _growths(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[int, LayerGrowth]]:
        for layer_idx, _, linear in self.adapted(model):
            growth = linear.loras_[name].growth_
            if growth is not None:
                yield layer_idx, growth

    def updates(self, model: "LlamaForCausalLM", name: str, num_steps: int) -> Updates | None:
        """The growth behind each step."""
        return RankGrowth(
            self._layers_of(model, name),
            grow_every=self.grow_every,
            grow_share=self.grow_share,
            max_rank=self.largest_rank,
            num_steps=num_steps,
            num_earlier=len(self.growth_history),
        )

    def at_largest(self, num_steps: int) -> "AdaptiveLoraConfig":
        """Every rank doubled as often as the steps have growths, as if each were of all layers, within ``max_rank``."""
        num_growths = (num_steps - 1) // self.grow_every  # nothing grows behind the last step

        def grown(rank: int) -> int:
            return rank << min(num_growths, (self.largest_rank // rank).bit_length() - 1)

        ranks = {key: grown(rank) for key, rank in self.rank_pattern.items()}
        return dataclasses.replace(self, r=grown(self.r), max_rank=self.largest_rank, rank_pattern=ranks)

    def on_few_layers(self, num_layers: int) -> "AdaptiveLoraConfig":
        """As LoRA's with the ranks that it begins with; it does not grow."""
        few = dataclasses.replace(self, grow_every=_NEVER, growth_history=())
        return super(AdaptiveLoraConfig, few).on_few_layers(num_layers)  # type: ignore[return-value]

    @classmethod
    def claims(cls, data: Mapping[str, Any]) -> bool:
        """A folder of LoRA's type that says how ranks grow."""
        return super().claims(data) and "grow_every" in data

    def to_peft(self, model: "LlamaForCausalLM", name: str) -> dict[str, Any]:
        """As LoRA's, with the rank and the alpha of every projection whose rank or scale is not that of the others."""
        ranks, alphas = {}, {}
        for layer_idx, projection, linear in self.adapted(model):
            path, lora = module_path(layer_idx, projection), linear.loras_[name]
            if lora.rank != self.r:
                ranks[path] = lora.rank
            alpha = self._alpha(lora)
            if alpha != self.lora_alpha:
                alphas[path] = alpha
        now = dataclasses.replace(
            self, rank_pattern=ranks, alpha_pattern=alphas, growth_history=self._history(model, name)
        )
        return super(AdaptiveLoraConfig, now).to_peft(model, name)

    def _alpha(self, lora: GrowingLora) -> float:
        """The ``lora_alpha`` that gives a pair its scale at its rank."""
        return alpha_at_rank(lora.scaling_, lora.rank) if self.use_rslora else lora.scaling_ * lora.rank

    def _history(self, model: "LlamaForCausalLM", name: str) -> tuple[Growth, ...]:
        growths = [growth for _, growth in self._growths(model, name)]
        if growths[0].steps_.is_meta:
            return self.growth_history
        steps = growths[0].steps_.tolist()
        importances = zip(*(growth.importances_.tolist() for growth in growths), strict=True)
        ranks = zip(*(growth.ranks_.tolist() for growth in growths), strict=True)
        return tuple(
            Growth(step=step, importance=importance, ranks=of_layers)
            for step, importance, of_layers in zip(steps, importances, ranks, strict=True)
        )
