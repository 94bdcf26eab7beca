"""Sparse LoRA: most entries of both factors are zero, at places drawn once or found by movement pruning.

Letters: I input features, O output features, R rank.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from moe_peft import strict
from moe_peft.adapters.lora import PLAIN_INITS, LoraConfig, peft_prefix
from moe_peft.adapters.method import Updates
from moe_peft.adapters.packed_bits import pack_bits, unpack_bits
from moe_peft.model.draws import generator_for
from moe_peft.model.linear import Linear, Lora

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

MASK_TYPES = ("random", "movement")
_FACTORS = ("lora_A", "lora_B")
_MASK = ".mask"  # behind a factor's checkpoint prefix


@dataclass(frozen=True, kw_only=True)
class SparseLoraConfig(LoraConfig):
    """Settings of a LoRA adapter whose factors keep a share of their entries at zero.

    Raises:
        ValueError: on a value outside its rule.
    """

    sparsity: float = field(
        default=0.5, metadata={"help": "share of each factor's entries that are zero, in [0, 1); at least one is not"}
    )
    mask_type: str = field(
        default="random",
        metadata={"help": "'random': drawn at the start; 'movement': those that training moves towards zero"},
    )
    prune_start: float = field(
        default=0.1, metadata={"help": "share of the steps after which movement pruning begins, in [0, 1)"}
    )
    prune_end: float = field(
        default=0.7, metadata={"help": "share of the steps at which it has reached its sparsity, in (prune_start, 1]"}
    )

    peft_type: ClassVar[str] = "SPARSE_LORA"
    inits: ClassVar[tuple[str, ...]] = PLAIN_INITS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be in [0, 1)")
        if self.mask_type not in MASK_TYPES:
            close = strict.did_you_mean(self.mask_type, MASK_TYPES)
            raise ValueError(f"mask_type={self.mask_type!r} must be one of {', '.join(MASK_TYPES)}{close}")
        if self.mask_type != "movement":
            for item in dataclasses.fields(self):
                if item.name.startswith("prune_") and getattr(self, item.name) != item.default:
                    value = getattr(self, item.name)
                    raise ValueError(f"{item.name}={value} changes nothing under mask_type={self.mask_type!r}")
        if not 0 <= self.prune_start < 1:
            raise ValueError(f"prune_start={self.prune_start} must be in [0, 1)")
        if not self.prune_start < self.prune_end <= 1:
            raise ValueError(f"prune_end={self.prune_end} must be in (prune_start={self.prune_start}, 1]")

    def new_lora(self, linear: Linear, seed: int, name: str, layer_idx: int, projection: str) -> "SparseLora":
        """Factors for one projection as LoRA's, with the masks of an adapter that has not been trained."""
        lora_a, lora_b = self.initial_factors(linear, (), seed, name, layer_idx, projection)
        masks = []
        for factor, weight in zip(_FACTORS, (lora_a, lora_b), strict=True):
            # On the meta device sizes alone count.
            mask = torch.ones(weight.numel(), dtype=torch.bool, device="meta" if weight.is_meta else "cpu")
            if self.mask_type == "random" and not weight.is_meta:
                generator = generator_for(seed, name, "init", layer_idx, projection, "mask", factor)
                count = num_zeros(weight.numel(), self.sparsity)
                mask[torch.randperm(weight.numel(), generator=generator, device="cpu")[:count]] = False
            masks.append(mask.view(weight.shape).to(weight.device))
        lora = SparseLora(
            lora_a,
            lora_b,
            *masks,
            keeps_scores=self.mask_type == "movement",
            scaling=self.scaling,
            dropout=self.lora_dropout,
            seed=seed,
        )
        lora.clear_masked()
        return lora

    def named_buffers(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Tensor]]:
        """The masks, and the scores of a movement-pruned adapter."""
        for prefix, lora in self._loras(model, name):
            for factor in _FACTORS:
                yield f"{prefix}.{factor}{_MASK}", lora.mask_of(factor)
                if lora.keeps_scores:
                    yield f"{prefix}.{factor}.score", lora.score_of(factor)

    def saved_buffers(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Tensor]]:
        """The masks."""
        return ((key, buffer) for key, buffer in self.named_buffers(model, name) if key.endswith(_MASK))

    def updates(self, model: "LlamaForCausalLM", name: str, num_steps: int) -> Updates | None:
        """The pruning behind each step; none of a random mask, whose zeros get no gradient to leave zero by."""
        if self.mask_type == "random":
            return None
        loras = [lora for _, lora in self._loras(model, name)]
        return MovementPruning(loras, self.sparsity, self.prune_start, self.prune_end, num_steps)

    def to_saved(self, model: "LlamaForCausalLM", name: str) -> dict[str, Tensor]:
        """The factors as they act, and eight places of a mask a byte."""
        state = super().to_saved(model, name)
        for key in [key for key in state if key.endswith(_MASK)]:
            weight = f"{key.removesuffix(_MASK)}.weight"
            state[weight] = torch.where(state[key], state[weight], 0.0)
            state[key] = pack_bits(state[key].to(torch.uint8), 1)
        return state

    def from_saved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The masks in their factors' shapes.

        Raises:
            ValueError: when a mask does not fit its factor, or the factor is not zero where the mask is.
        """
        found = dict(super().from_saved(weights))
        for key, packed in weights.items():
            factor = weights.get(f"{key.removesuffix(_MASK)}.weight")
            if not key.endswith(_MASK) or factor is None:
                continue
            size = math.ceil(factor.numel() / 8)
            if packed.dtype != torch.uint8 or packed.shape != (size,):
                has = f"{list(packed.shape)} of {packed.dtype}"
                raise ValueError(f"{key} is {has}, but a factor of shape {list(factor.shape)} takes {size} bytes")
            mask = unpack_bits(packed, 1)[: factor.numel()].view(factor.shape).bool()
            if factor.double()[~mask].count_nonzero():  # no narrower type can be both indexed and counted on a CPU
                raise ValueError(f"{key} masks entries that are not zero in the factor: the two are of different files")
            found[key] = mask
        return found

    def _loras(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, "SparseLora"]]:
        for layer_idx, projection, linear in self.adapted(model):
            yield peft_prefix(layer_idx, projection), linear.loras_[name]


class SparseLora(Lora):
    """A factor pair of which only the entries that its masks keep act, and get a gradient.

    Args:
        lora_A: ``[R, I]``.
        lora_B: ``[O, R]``.
        mask_a: bool ``[R, I]``, true where an entry is kept.
        mask_b: bool ``[O, R]``.
        keeps_scores: whether there are movement scores, in shape and dtype as the factors.
        scaling: factor of the product.
        dropout: probability of zeroing a feature of the input during training.
        seed: of the adapter's draws.
    """

    mask_a_: Tensor
    mask_b_: Tensor
    score_a_: Tensor
    score_b_: Tensor

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        mask_a: Tensor,
        mask_b: Tensor,
        *,
        keeps_scores: bool,
        scaling: float,
        dropout: float,
        seed: int,
    ) -> None:
        super().__init__(lora_A, lora_B, scaling=scaling, dropout=dropout, seed=seed)
        self.register_buffer("mask_a_", mask_a)
        self.register_buffer("mask_b_", mask_b)
        if keeps_scores:
            self.register_buffer("score_a_", torch.zeros_like(lora_A))
            self.register_buffer("score_b_", torch.zeros_like(lora_B))

    @property
    def keeps_scores(self) -> bool:
        """Whether it is pruned by movement."""
        return hasattr(self, "score_a_")

    def mask_of(self, factor: str) -> Tensor:
        """The mask of ``lora_A`` or ``lora_B``."""
        return self.mask_a_ if factor == "lora_A" else self.mask_b_

    def score_of(self, factor: str) -> Tensor:
        """The movement scores of ``lora_A`` or ``lora_B``."""
        return self.score_a_ if factor == "lora_A" else self.score_b_

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """The factors with zeros at the masked places, whatever the parameters hold there."""
        # Chosen, not multiplied: a masked NaN or infinity stays masked, in the gradient, too.
        return torch.where(self.mask_a_, self.lora_A, 0.0), torch.where(self.mask_b_, self.lora_B, 0.0)

    @torch.no_grad()
    def clear_masked(self) -> None:
        """Have the parameters, too, hold zeros at the masked places."""
        self.lora_A.masked_fill_(~self.mask_a_, 0.0)
        self.lora_B.masked_fill_(~self.mask_b_, 0.0)


class MovementPruning:
    """Movement pruning, factor by factor (https://arxiv.org/abs/2005.07683, with its cubic schedule).

    Behind each optimizer step an entry's score grows by ``-weight * gradient``: it falls while training moves the entry
    towards zero. Then the entries with the lowest scores are masked, as many as the schedule asks for. What is masked
    stays so: its weight is zero, and its score, which no longer changes, counts as the lowest.

    Args:
        loras: to be pruned.
        sparsity: share of zeros at the end.
        start: share of the steps after which pruning begins.
        end: share of the steps at which it has reached ``sparsity``.
        num_steps: optimizer steps of the whole training.
    """

    def __init__(self, loras: list[SparseLora], sparsity: float, start: float, end: float, num_steps: int) -> None:
        self._loras = loras
        self._sparsity = sparsity
        self._start = start
        self._end = end
        self._num_steps = num_steps
        self._share = -1.0  # of zeros, when the masks were last chosen here

    def share_at(self, step: int) -> float:
        """The share of zeros behind a step, counted from 1."""
        done = (step / self._num_steps - self._start) / (self._end - self._start)
        return self._sparsity * (1 - (1 - min(max(done, 0.0), 1.0)) ** 3)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Count the step's movement, mask what the schedule asks for, and undo what momentum did to masked entries."""
        share = self.share_at(step)
        for lora in self._loras:
            for factor in _FACTORS:
                weight, score, mask = getattr(lora, factor), lora.score_of(factor), lora.mask_of(factor)
                if weight.grad is not None:
                    score.sub_(weight * weight.grad)
                if share != self._share:
                    mask.logical_and_(_highest(score, mask, num_zeros(mask.numel(), share)))
            lora.clear_masked()
        self._share = share


def _highest(score: Tensor, mask: Tensor, count: int) -> Tensor:
    """A mask of all but the ``count`` lowest scores; masked entries come first, of equal scores the first one."""
    order = score.masked_fill(~mask, -math.inf).flatten().argsort(stable=True)
    kept = torch.ones_like(mask).flatten()
    kept[order[:count]] = False
    return kept.view_as(mask)


def num_zeros(count: int, sparsity: float) -> int:
    """How many of ``count`` entries are masked: the nearest whole number, of two the even one, but never all."""
    return min(round(sparsity * count), count - 1)
