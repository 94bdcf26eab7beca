"""(IA)³: learned factors of keys, values and feed-forward activations (https://arxiv.org/abs/2205.05638).

Letters: n tokens of one adapter, I input features, O output features.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from moe_peft import strict
from moe_peft.adapters.lora import (
    ALL_LINEAR,
    PROJECTIONS,
    check_targets,
    chosen_projections,
    last_names,
    peft_prefix,
    target_linears,
)
from moe_peft.adapters.method import Method, NamedWeight
from moe_peft.model.draws import generator_for
from moe_peft.model.linear import Linear, LinearAdapter, wide_dtype

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

FEEDFORWARD = "down_proj"


@dataclass(frozen=True, kw_only=True)
class IA3Config(Method):
    """Settings of an (IA)³ adapter, spelled as PEFT spells them.

    Raises:
        ValueError: on an unknown target module, or a feed-forward module that is no target.
    """

    target_modules: str | tuple[str, ...] = field(
        default=("k_proj", "v_proj", FEEDFORWARD),
        metadata={"help": f"'{ALL_LINEAR}' or a list of {', '.join(PROJECTIONS)}"},
    )
    feedforward_modules: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "the targets whose input is scaled; the others' output is. "
            f"null: {FEEDFORWARD}, where it is a target"
        },
    )
    init_ia3_weights: bool = field(default=True, metadata={"help": "true: all factors 1; false: random factors"})

    peft_type: ClassVar[str] = "IA3"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self.target_modules)
        for name in self.feedforward_modules or ():
            if name not in self.targets:
                raise ValueError(
                    f"feedforward_modules has {name!r}, but must be of the target_modules "
                    f"{', '.join(self.targets)}{strict.did_you_mean(name, self.targets)}"
                )
        if len(set(self.feedforward_modules or ())) < len(self.feedforward_modules or ()):
            raise ValueError(f"feedforward_modules={list(self.feedforward_modules or ())} names a module twice")

    @property
    def targets(self) -> tuple[str, ...]:
        """The target projections, in the model's order."""
        return chosen_projections(self.target_modules)

    @property
    def feedforward(self) -> tuple[str, ...]:
        """Those of the targets whose input is scaled."""
        chosen = (FEEDFORWARD,) if self.feedforward_modules is None else self.feedforward_modules
        return tuple(name for name in self.targets if name in chosen)

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put factors on every target projection of every layer."""
        for layer_idx, projection, linear in target_linears(model, self.targets):
            is_feedforward = projection in self.feedforward
            size = linear.in_features if is_feedforward else linear.out_features
            factors = self._initial_factors(linear, size, (seed, name, "init", layer_idx, projection))
            linear.loras_[name] = IA3(factors, is_feedforward=is_feedforward)

    def _initial_factors(self, linear: Linear, size: int, key: tuple[object, ...]) -> Tensor:
        factors = torch.ones(size, dtype=wide_dtype(linear.base_layer_.weight.dtype))
        if not self.init_ia3_weights:
            factors.normal_(generator=generator_for(*key))
        return factors.to(linear.base_layer_.weight.device)

    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """PEFT's checkpoint names with the vector of factors."""
        for layer_idx, projection, linear in target_linears(model, self.targets):
            yield f"{peft_prefix(layer_idx, projection)}.ia3_l", linear.loras_[name].ia3_l, None

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """As PEFT's, which names its default feed-forward modules even where they are no targets."""
        own = dict(data)
        if own.get("target_modules") is not None:
            own["target_modules"] = targets = last_names(own["target_modules"])
            modules = last_names(own.get("feedforward_modules"))
            if isinstance(targets, list) and isinstance(modules, list):
                own["feedforward_modules"] = [module for module in modules if module in targets]
        return {**own, "init_ia3_weights": True}  # the factors are in the folder

    def to_peft(self, model: "LlamaForCausalLM", name: str) -> dict[str, Any]:
        """With every target by its name, as PEFT writes them."""
        modules = {"target_modules": list(self.targets), "feedforward_modules": list(self.feedforward)}
        return {**super().to_peft(model, name), **modules}

    def to_saved(self, model: "LlamaForCausalLM", name: str) -> dict[str, Tensor]:
        """PEFT's shapes: ``[1, I]`` of an input, ``[O, 1]`` of an output."""
        state = super().to_saved(model, name)
        return {key: factors.unsqueeze(0 if self._scales_input(key) else 1) for key, factors in state.items()}

    def from_saved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's shapes as vectors, which weight decay spares: it would pull factors of 1 towards 0.

        Raises:
            ValueError: when a tensor is neither a row of an input's factors nor a column of an output's.
        """
        vectors = dict(weights)
        for key, factors in weights.items():
            if not key.endswith(".ia3_l"):
                continue
            one = 0 if self._scales_input(key) else 1
            if factors.dim() != 2 or factors.shape[one] != 1:
                wanted = "[1, I], factors of an input" if one == 0 else "[O, 1], factors of an output"
                raise ValueError(f"{key} has shape {list(factors.shape)}, but must have {wanted}")
            vectors[key] = factors.flatten()
        return vectors

    def _scales_input(self, key: str) -> bool:
        return any(key.endswith(f".{projection}.ia3_l") for projection in self.feedforward)


class IA3(LinearAdapter):
    """Factors of one projection's input or output.

    Args:
        ia3_l: ``[I]`` where the input is scaled, else ``[O]``.
        is_feedforward: it is the input.
    """

    def __init__(self, ia3_l: Tensor, *, is_feedforward: bool) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(ia3_l)
        self.changes_input_ = is_feedforward
        self.changes_output_ = not is_feedforward

    def before(self, x: Tensor) -> Tensor:
        """``l ⊙ x`` of ``[n, I]``."""
        return (x * self.ia3_l).to(x.dtype)

    def behind(self, y: Tensor, base_layer: nn.Linear) -> Tensor:
        """``l ⊙ y`` of ``[n, O]``, the bias scaled with it."""
        return (y * self.ia3_l).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight's columns scaled where the input is, else its rows and the bias."""
        if self.changes_input_:
            return weight * self.ia3_l, bias
        return weight * self.ia3_l[:, None], None if bias is None else bias * self.ia3_l
