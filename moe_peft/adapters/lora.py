"""LoRA: a low-rank update beside a frozen projection (https://arxiv.org/abs/2106.09685).

Letters: I input features, O output features, R rank.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from moe_peft import strict
from moe_peft.adapters.base_inits import (
    OLORA,
    PISSA,
    ShiftedLora,
    alpha_at_rank,
    factors_of_base,
    is_base_init,
)
from moe_peft.adapters.layer_patterns import (
    check_layers,
    check_matches,
    check_pattern,
    chosen_layers,
    layers_of_folder,
    value_at,
)
from moe_peft.adapters.method import Method, NamedWeight, check_size
from moe_peft.model.draws import generator_for
from moe_peft.model.linear import Linear, Lora, wide_dtype

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION_PROJECTIONS + FFN_PROJECTIONS
ALL_LINEAR = "all-linear"
PLAIN_INITS = ("gaussian",)
BASE_INITS = (PISSA, f"{PISSA}_niter_N", OLORA)
# Inits of PEFT that leave the base as it is.
_PEFT_PLAIN_INITS = (True, False, *PLAIN_INITS, "eva", "orthogonal", "mica")


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
        default=True,
        metadata={
            "help": "true: A uniform (Kaiming), B zero; 'gaussian': A normal; false: B random too; 'pissa', "
            "'pissa_niter_N', 'olora': from the frozen weight"
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "ranks that differ from r: module's name, or regular expression of its path's end, to rank"},
    )
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "the same for lora_alpha"})
    layers_to_transform: int | tuple[int, ...] | None = field(
        default=None, metadata={"help": "the layer, or list of layers, counted from 0, to adapt; null: all"}
    )

    peft_type: ClassVar[str] = "LORA"
    inits: ClassVar[tuple[str, ...]] = (*PLAIN_INITS, *BASE_INITS)  # what init_lora_weights may name
    refused: ClassVar[tuple[str, ...]] = ()  # fields of LoRA's that a method derived from it does not honour

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("r", self.r)
        check_update(self.lora_alpha, self.lora_dropout)
        self._check_init()
        check_targets(self.target_modules)
        check_pattern("rank_pattern", self.rank_pattern, 1)
        check_pattern("alpha_pattern", self.alpha_pattern, 0)
        check_layers(self.layers)
        for key in self.refused:
            if getattr(self, key) not in (None, {}):
                value = strict.plain(getattr(self, key))
                raise ValueError(f"{key}={value!r} changes the adapter and is not supported for {self.peft_type}")

    def _check_init(self) -> None:
        init = self.init_lora_weights
        from_base = is_base_init(init) and self.inits != PLAIN_INITS
        if isinstance(init, str) and init not in PLAIN_INITS and not from_base:
            choices = ", ".join(map(repr, self.inits))
            close = strict.did_you_mean(init, self.inits)
            raise ValueError(f"init_lora_weights={init!r} must be true, false or {choices}{close}")

    @property
    def targets(self) -> tuple[str, ...]:
        """The target projections, in the model's order."""
        return chosen_projections(self.target_modules)

    @property
    def scaling(self) -> float:
        """Factor of ``B A``; with ``use_rslora`` as in https://arxiv.org/abs/2312.03732."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers that get the adapter; None: all of them."""
        return chosen_layers(self.layers_to_transform)

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put a fresh pair of factors on every target projection of every layer to transform.

        Raises:
            ValueError: on a layer that the model does not have, a pattern that matches no adapted module, or a rank
                that a projection is too small for.
        """
        check_layers(self.layers, len(model.decoder_layers))
        paths = [module_path(layer_idx, projection) for layer_idx, projection, _ in self.adapted(model)]
        check_matches("rank_pattern", self.rank_pattern, paths)
        check_matches("alpha_pattern", self.alpha_pattern, paths)
        for layer_idx, projection, linear in self.adapted(model):
            own = self.at(layer_idx, projection)
            linear.loras_[name] = own.new_lora(linear, seed, name, layer_idx, projection)

    def adapted(self, model: "LlamaForCausalLM") -> Iterator[tuple[int, str, Linear]]:
        """Layer index, projection name and layer of every projection that the adapter is on, in the model's order."""
        return target_linears(model, self.targets, self.layers)

    def at(self, layer_idx: int, projection: str) -> "LoraConfig":
        """The settings on one projection: the patterns' rank and alpha in their fields."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        path = module_path(layer_idx, projection)
        rank = value_at(self.rank_pattern, path, self.r)
        alpha = value_at(self.alpha_pattern, path, self.lora_alpha)
        return dataclasses.replace(self, r=rank, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})

    def new_lora(self, linear: Linear, seed: int, name: str, layer_idx: int, projection: str) -> Lora:
        """Factors for one projection, drawn from the adapter's own seed or made of its weight."""
        own: dict[str, Any] = {"scaling": self.scaling, "dropout": self.lora_dropout, "seed": seed}
        if is_base_init(self.init_lora_weights):
            return ShiftedLora(*self.base_factors(linear, seed, name, layer_idx, projection), **own)
        return Lora(*self.initial_factors(linear, (), seed, name, layer_idx, projection), **own)

    def base_factors(
        self, linear: Linear, seed: int, name: str, layer_idx: int, projection: str
    ) -> tuple[Tensor, Tensor]:
        """A ``[R, I]`` and B ``[O, R]`` that start from the frozen weight; what they give is to be subtracted again.

        Raises:
            ValueError: when the rank is above the weight's.
        """
        init, most = str(self.init_lora_weights), min(linear.in_features, linear.out_features)
        if self.r > most:
            where = module_path(layer_idx, projection)
            raise ValueError(f"r={self.r} must be at most {most}, the smaller side of {where}, for {init!r}")
        generator = generator_for(seed, name, "init", layer_idx, projection)
        return factors_of_base(linear.base_layer_.weight, self.r, self.scaling, init, generator)

    def initial_factors(
        self, linear: Linear, stack: tuple[int, ...], seed: int, name: str, layer_idx: int, projection: str
    ) -> tuple[Tensor, Tensor]:
        """A ``[*stack, R, I]`` and B ``[*stack, O, R]`` as ``init_lora_weights`` says, unless it says: from the base.

        Raises:
            ValueError: when it does.
        """
        if is_base_init(self.init_lora_weights):
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} is not supported for {self.peft_type}")
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
        for layer_idx, projection, linear in self.adapted(model):
            yield from lora_weights(linear, name, peft_prefix(layer_idx, projection))

    def named_buffers(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Tensor]]:
        """The first factors of those that started from the base."""
        for prefix, lora in self._shifted(model, name):
            yield f"{prefix}.lora_A.initial", lora.initial_a_
            yield f"{prefix}.lora_B.initial", lora.initial_b_

    def _shifted(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Any]]:
        for layer_idx, projection, linear in self.adapted(model):
            lora = linear.loras_.get(name)
            if isinstance(lora, ShiftedLora) and lora.initial_a_ is not None:
                yield peft_prefix(layer_idx, projection), lora

    def on_few_layers(self, num_layers: int) -> "LoraConfig":
        """Every layer with the mean rank of all, a layer that is left out counting as none; nothing is decomposed."""
        chosen = self.layers or range(num_layers)
        ranks = {
            projection: max(1, math.ceil(sum(self.at(layer, projection).r for layer in chosen) / num_layers))
            for projection in self.targets
        }
        from_base = is_base_init(self.init_lora_weights)
        return dataclasses.replace(
            self,
            rank_pattern={name: rank for name, rank in ranks.items() if rank != self.r},
            alpha_pattern={},
            layers_to_transform=None,
            init_lora_weights=f"{PISSA}_niter_0" if from_base else self.init_lora_weights,
        )

    @classmethod
    def claims(cls, data: Mapping[str, Any]) -> bool:
        """All but DoRA, which shares the type."""
        return not data.get("use_dora")

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """As PEFT's, whose targets may be dotted suffixes.

        The init that drew the file's weights no longer matters, unless it changed the base model: then the change is
        computed again from the base, as PEFT does.
        """
        own = dict(data)
        init = own.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower() == OLORA:
            init = OLORA
        if init in _PEFT_PLAIN_INITS:
            init = True
        elif not is_base_init(init) or cls.inits == PLAIN_INITS:
            raise ValueError(f"init_lora_weights={init!r} was trained against a changed base model")
        own["layers_to_transform"] = layers_of_folder(own, module_path(0, PROJECTIONS[0]))
        for key in ("rank_pattern", "alpha_pattern"):
            own[key] = {} if own.get(key) is None else own[key]
        targets = last_names(own.get("target_modules", ALL_LINEAR))
        return {**own, "init_lora_weights": init, "target_modules": targets}

    def to_peft(self, model: "LlamaForCausalLM", name: str) -> dict[str, Any]:
        """With every target by its name, and whole numbers as such, as PEFT writes them."""
        saved = self._as_plain(model) if is_base_init(self.init_lora_weights) else self
        own = {
            "bias": "none",
            "lora_alpha": whole(saved.lora_alpha),
            "alpha_pattern": {key: whole(alpha) for key, alpha in saved.alpha_pattern.items()},
            "target_modules": list(self.targets),
        }
        return {**dataclasses.asdict(saved), **own}

    def _as_plain(self, model: "LlamaForCausalLM") -> "LoraConfig":
        """The settings of the same update on the unchanged base: twice the rank, each at the scale it has."""
        alpha, alphas = 2 * self.lora_alpha, {key: 2 * value for key, value in self.alpha_pattern.items()}
        if self.use_rslora:
            alpha = alpha_at_rank(self.scaling, 2 * self.r)
            if self.rank_pattern or self.alpha_pattern:  # what an alpha becomes depends on the rank beside it
                own = {(layer, name): self.at(layer, name) for layer, name, _ in self.adapted(model)}
                alphas = {module_path(*place): alpha_at_rank(at.scaling, 2 * at.r) for place, at in own.items()}
        ranks = {key: 2 * rank for key, rank in self.rank_pattern.items()}
        return dataclasses.replace(
            self, init_lora_weights=True, r=2 * self.r, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas
        )

    def to_saved(self, model: "LlamaForCausalLM", name: str) -> dict[str, Tensor]:
        """The factors as they act on the unchanged base."""
        state = super().to_saved(model, name)
        for prefix, lora in self._shifted(model, name):
            for factor, weight in zip(("lora_A", "lora_B"), lora.low_rank(), strict=True):
                state[f"{prefix}.{factor}.weight"] = weight.detach()
        return state


def whole(value: float) -> float:
    """A whole number as such, as PEFT writes it."""
    return int(value) if float(value).is_integer() else value


def chosen_projections(target_modules: str | tuple[str, ...]) -> tuple[str, ...]:
    """What ``target_modules`` names, in the model's order."""
    return tuple(name for name in PROJECTIONS if target_modules == ALL_LINEAR or name in target_modules)


def last_names(modules: Any) -> Any:
    """A folder's list of modules, which may be dotted suffixes of their paths, as the projections' own names."""
    if isinstance(modules, list) and all(isinstance(module, str) for module in modules):
        return list(dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules))
    return modules


def module_path(layer_idx: int, projection: str) -> str:
    """What transformers calls a projection, and PEFT's patterns are matched against."""
    room = "self_attn" if projection in ATTENTION_PROJECTIONS else "mlp"
    return f"model.layers.{layer_idx}.{room}.{projection}"


def peft_prefix(layer_idx: int, projection: str) -> str:
    """Where PEFT's checkpoints keep what an adapter has on a projection."""
    return f"base_model.model.{module_path(layer_idx, projection)}"


def target_linears(
    model: "LlamaForCausalLM", projections: tuple[str, ...], layers: tuple[int, ...] | None = None
) -> Iterator[tuple[int, str, Linear]]:
    """Layer index, projection name and layer of every named projection, in the model's order.

    Args:
        model: the base.
        projections: their names.
        layers: those looked at; None: all of them.
    """
    for layer_idx, layer in enumerate(model.decoder_layers):
        if layers is not None and layer_idx not in layers:
            continue
        for projection in projections:
            owner = layer.self_attn if projection in ATTENTION_PROJECTIONS else layer.mlp
            yield layer_idx, projection, getattr(owner, projection)


def lora_weights(linear: Linear, name: str, prefix: str) -> Iterator[tuple[str, nn.Parameter, None]]:
    """The two factors of an adapter on one projection, under a checkpoint prefix."""
    lora = linear.loras_[name]
    for factor in ("lora_A", "lora_B"):
        yield f"{prefix}.{factor}.weight", getattr(lora, factor), None


def check_update(lora_alpha: float, lora_dropout: float) -> None:
    """Refuses a scale or a dropout that a low-rank update cannot have.

    Raises:
        ValueError: naming the field.
    """
    if not (lora_alpha > 0 and math.isfinite(lora_alpha)):
        raise ValueError(f"lora_alpha={lora_alpha} must be above 0")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout={lora_dropout} must be in [0, 1)")


def check_targets(target_modules: str | tuple[str, ...]) -> None:
    """Refuses target modules that are no projections, or none, or named twice.

    Raises:
        ValueError: naming the nearest valid name.
    """
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
