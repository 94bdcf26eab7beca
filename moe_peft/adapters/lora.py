"""LoRA: a low-rank update beside a frozen projection (https://arxiv.org/abs/2106.09685).

Letters: I input features, O output features, R rank.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from moe_peft import strict
from moe_peft.adapters.method import Method, NamedWeight
from moe_peft.model.draws import generator_for
from moe_peft.model.linear import Linear, Lora, wide_dtype

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION_PROJECTIONS + FFN_PROJECTIONS
ALL_LINEAR = "all-linear"
INITS = ("gaussian",)
# Inits of PEFT that leave the base as it is. The others (pissa, olora, ...) are saved against a changed base.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Method):
    """Settings of a LoRA adapter, spelled as PEFT spells them.

    Raises:
        ValueError: on a value outside its rule, or an unknown target module.
    """

    r: int = field(default=8, metadata={"help": "rank of the update"})
    lora_alpha: float = field(default=16, metadata={"help": "the update is scaled by lora_alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the update's input, in training only"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by lora_alpha / sqrt(r) instead"})
    target_modules: str | tuple[str, ...] = field(
        default=ALL_LINEAR, metadata={"help": f"'{ALL_LINEAR}' or a list of {', '.join(PROJECTIONS)}"}
    )
    init_lora_weights: bool | str = field(
        default=True, metadata={"help": "true: A uniform (Kaiming), B zero; 'gaussian': A normal; false: B random too"}
    )

    peft_type: ClassVar[str] = "LORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ValueError(f"r={self.r} must be at least 1")
        if not (self.lora_alpha > 0 and math.isfinite(self.lora_alpha)):
            raise ValueError(f"lora_alpha={self.lora_alpha} must be above 0")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be in [0, 1)")
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights not in INITS:
            close = strict.did_you_mean(self.init_lora_weights, INITS)
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} must be true, false or {INITS[0]!r}{close}")
        _check_targets(self.target_modules)

    @property
    def targets(self) -> tuple[str, ...]:
        """The target projections, in the model's order."""
        chosen = PROJECTIONS if self.target_modules == ALL_LINEAR else self.target_modules
        return tuple(name for name in PROJECTIONS if name in chosen)

    @property
    def scaling(self) -> float:
        """Factor of ``B A``; with ``use_rslora`` as in https://arxiv.org/abs/2312.03732."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put a fresh pair of factors on every target projection of every layer."""
        for layer_idx, projection, linear in target_linears(model, self.targets):
            linear.loras_[name] = self.new_lora(linear, seed, name, layer_idx, projection)

    def new_lora(self, linear: Linear, seed: int, name: str, layer_idx: int, projection: str) -> Lora:
        """Factors for one projection, drawn from the adapter's own seed."""
        lora_a, lora_b = self.initial_factors(linear, (), seed, name, layer_idx, projection)
        return Lora(lora_a, lora_b, scaling=self.scaling, dropout=self.lora_dropout, seed=seed)

    def initial_factors(
        self, linear: Linear, stack: tuple[int, ...], seed: int, name: str, layer_idx: int, projection: str
    ) -> tuple[Tensor, Tensor]:
        """A ``[*stack, R, I]`` and B ``[*stack, O, R]`` as ``init_lora_weights`` says."""
        generator = generator_for(seed, name, "init", layer_idx, projection)
        dtype = wide_dtype(linear.base_layer_.weight.dtype)
        lora_a = torch.empty(*stack, self.r, linear.in_features, dtype=dtype)
        lora_b = torch.zeros(*stack, linear.out_features, self.r, dtype=dtype)
        if self.init_lora_weights == "gaussian":
            lora_a.normal_(std=1 / self.r, generator=generator)
        else:
            # kaiming_uniform_ with a = sqrt(5), which torch gives nn.Linear and PEFT gives A.
            bound = 1 / math.sqrt(linear.in_features)
            lora_a.uniform_(-bound, bound, generator=generator)
        if self.init_lora_weights is False:
            bound = 1 / math.sqrt(self.r)
            lora_b.uniform_(-bound, bound, generator=generator)
        device = linear.base_layer_.weight.device
        return lora_a.to(device), lora_b.to(device)

    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """PEFT's checkpoint names with the parameter that holds each weight."""
        for layer_idx, projection, linear in target_linears(model, self.targets):
            room = "self_attn" if projection in ATTENTION_PROJECTIONS else "mlp"
            prefix = f"base_model.model.model.layers.{layer_idx}.{room}.{projection}"
            yield from lora_weights(linear, name, prefix)

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """As PEFT's, whose targets may be dotted suffixes; the init that drew the file's weights no longer matters."""
        own = dict(data)
        init = own.get("init_lora_weights", True)
        if init not in _PLAIN_INITS:
            raise ValueError(f"init_lora_weights={init!r} was trained against a changed base model")
        own["init_lora_weights"] = True
        targets = own.get("target_modules")
        if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
            own["target_modules"] = list(dict.fromkeys(target.rsplit(".", 1)[-1] for target in targets))
        return own

    def to_peft(self, model: "LlamaForCausalLM", name: str) -> dict[str, Any]:
        """With every target by its name, and whole numbers as such, as PEFT writes them."""
        alpha = int(self.lora_alpha) if float(self.lora_alpha).is_integer() else self.lora_alpha
        return {**super().to_peft(model, name), "lora_alpha": alpha, "target_modules": list(self.targets)}


def target_linears(model: "LlamaForCausalLM", projections: tuple[str, ...]) -> Iterator[tuple[int, str, Linear]]:
    """Layer index, projection name and layer of every named projection, in the model's order."""
    for layer_idx, layer in enumerate(model.decoder_layers):
        for projection in projections:
            owner = layer.self_attn if projection in ATTENTION_PROJECTIONS else layer.mlp
            yield layer_idx, projection, getattr(owner, projection)


def lora_weights(linear: Linear, name: str, prefix: str) -> Iterator[tuple[str, nn.Parameter, None]]:
    """The two factors of an adapter on one projection, under a checkpoint prefix."""
    lora = linear.loras_[name]
    for factor in ("lora_A", "lora_B"):
        yield f"{prefix}.{factor}.weight", getattr(lora, factor), None


def _check_targets(target_modules: str | tuple[str, ...]) -> None:
    if target_modules == ALL_LINEAR:
        return
    rule = f"must be {ALL_LINEAR!r} or a list of {', '.join(PROJECTIONS)}"
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError(
            f"target_modules={target_modules!r} {rule}{strict.did_you_mean(target_modules, (ALL_LINEAR, *PROJECTIONS))}"
        )
    for name in target_modules:
        if name not in PROJECTIONS:
            raise ValueError(f"target_modules has {name!r}, but {rule}{strict.did_you_mean(name, PROJECTIONS)}")
    if len(set(target_modules)) < len(target_modules):
        raise ValueError(f"target_modules={list(target_modules)} names a module twice")
