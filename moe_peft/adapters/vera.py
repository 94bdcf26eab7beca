"""VeRA: one frozen random pair for all projections, trained vectors for each (https://arxiv.org/abs/2310.11454).

Letters: I input features, O output features, R rank.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from moe_peft.adapters.layer_patterns import check_layers, chosen_layers, layers_of_folder
from moe_peft.adapters.lora import (
    ALL_LINEAR,
    PROJECTIONS,
    check_targets,
    chosen_projections,
    last_names,
    module_path,
    peft_prefix,
    target_linears,
)
from moe_peft.adapters.method import Method, NamedWeight, check_size
from moe_peft.model.draws import generator_for
from moe_peft.model.linear import Linear, LinearAdapter, wide_dtype

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

SAVED_A, SAVED_B = "base_model.vera_A", "base_model.vera_B"


@dataclass(frozen=True, kw_only=True)
class VeraConfig(Method):
    """Settings of a VeRA adapter, spelled as PEFT spells them.

    Raises:
        ValueError: on a value outside its rule, or an unknown target module.
    """

    r: int = field(default=256, metadata={"help": "rank of the shared pair"})
    vera_dropout: float = field(default=0.0, metadata={"help": "dropout on the update's input, in training only"})
    d_initial: float = field(default=0.1, metadata={"help": "what vera_lambda_d starts with"})
    projection_prng_key: int = field(default=0, metadata={"help": "seed of the shared pair, as PEFT draws it"})
    save_projection: bool = field(
        default=True, metadata={"help": "keep the shared pair in the adapter's folder; false: draw it again at load"}
    )
    target_modules: str | tuple[str, ...] = field(
        default=ALL_LINEAR, metadata={"help": f"'{ALL_LINEAR}' or a list of {', '.join(PROJECTIONS)}"}
    )
    layers_to_transform: int | tuple[int, ...] | None = field(
        default=None, metadata={"help": "the layer, or a list of the layers, that get the adapter; null: all"}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "true: vera_lambda_b 0, vera_lambda_d d_initial; false: vera_lambda_b 1, the other random"},
    )

    peft_type: ClassVar[str] = "VERA"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("r", self.r)
        most = torch.finfo(torch.float32).max
        if abs(self.d_initial) > most:
            raise ValueError(f"d_initial={self.d_initial} must be in -{most}..{most}, which float32 holds")
        if self.d_initial == 0 and self.init_weights:
            raise ValueError(
                f"d_initial={self.d_initial} must not be 0 with init_weights=true: vera_lambda_b begins at 0, too, and "
                "neither vector would ever get a gradient"
            )
        if not 0.0 <= self.vera_dropout < 1.0:
            raise ValueError(f"vera_dropout={self.vera_dropout} must be in [0, 1)")
        if not 0 <= self.projection_prng_key < 2**63:
            raise ValueError(f"projection_prng_key={self.projection_prng_key} must be in 0..2**63-1")
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

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put fresh vectors on every target projection of the layers, beside the shared pair."""
        check_layers(self.layers, len(model.decoder_layers))
        sites = list(target_linears(model, self.targets, self.layers))
        projections = self._projections(model, [linear for _, _, linear in sites])
        for layer_idx, projection, linear in sites:
            lambda_b, lambda_d = self._initial_vectors(linear, (seed, name, "init", layer_idx, projection))
            vera = Vera(lambda_b, lambda_d, projections, linear.in_features, dropout=self.vera_dropout, seed=seed)
            linear.loras_[name] = vera

    def _projections(self, model: "LlamaForCausalLM", linears: list[Linear]) -> "VeraProjections":
        """The pair that fits all of these; another adapter's, where it has the same."""
        key, weight = self.projection_prng_key, linears[0].base_layer_.weight
        a_shape = self.r, max(linear.in_features for linear in linears)
        b_shape = max(linear.out_features for linear in linears), self.r
        for other in _projections_on(model):
            if (other.key_, tuple(other.vera_A.shape), tuple(other.vera_B.shape)) == (key, a_shape, b_shape):
                return other
        generator = torch.Generator("cpu").manual_seed(key)  # PEFT's, and one stream for both: A comes first
        vera_a, vera_b = (_kaiming_uniform(shape, generator) for shape in (a_shape, b_shape))
        dtype = wide_dtype(weight.dtype)
        return VeraProjections(vera_a.to(weight.device, dtype), vera_b.to(weight.device, dtype), key)

    def _initial_vectors(self, linear: Linear, key: tuple[object, ...]) -> tuple[Tensor, Tensor]:
        """vera_lambda_b ``[O]`` and vera_lambda_d ``[R]`` as ``init_weights`` says."""
        weight = linear.base_layer_.weight
        lambda_b = torch.zeros(linear.out_features, dtype=wide_dtype(weight.dtype))
        lambda_d = torch.full((self.r,), self.d_initial, dtype=lambda_b.dtype)
        if not self.init_weights:
            lambda_b.fill_(1.0)
            lambda_d.normal_(generator=generator_for(*key))
        return lambda_b.to(weight.device), lambda_d.to(weight.device)

    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """PEFT's checkpoint names with the two vectors of each projection."""
        for layer_idx, projection, linear in target_linears(model, self.targets, self.layers):
            vera, prefix = linear.loras_[name], peft_prefix(layer_idx, projection)
            yield f"{prefix}.vera_lambda_b", vera.vera_lambda_b, None
            yield f"{prefix}.vera_lambda_d", vera.vera_lambda_d, None

    def saved_buffers(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Tensor]]:
        """The shared pair, with ``save_projection``; it never changes, so no checkpoint of a run needs it."""
        if self.save_projection:
            projections = self._adapters(model, name)[0].projections_
            yield SAVED_A, projections.vera_A
            yield SAVED_B, projections.vera_B

    def restore_buffers(self, model: "LlamaForCausalLM", name: str, buffers: Mapping[str, Tensor]) -> None:
        """Take over a folder's pair without touching that of other adapters: it may have been drawn elsewhere."""
        if not self.save_projection:
            return
        adapters = self._adapters(model, name)
        own = adapters[0].projections_
        vera_a, vera_b = buffers[SAVED_A].to(own.vera_A), buffers[SAVED_B].to(own.vera_B)
        same = (
            other
            for other in _projections_on(model)
            if torch.equal(other.vera_A, vera_a) and torch.equal(other.vera_B, vera_b)
        )
        projections = next(same, None) or VeraProjections(vera_a, vera_b, key=None)
        for adapter in adapters:
            adapter.projections_ = projections

    def _adapters(self, model: "LlamaForCausalLM", name: str) -> "list[Vera]":
        return [linear.loras_[name] for _, _, linear in target_linears(model, self.targets, self.layers)]

    def on_few_layers(self, num_layers: int) -> "VeraConfig":
        """Every layer with the mean rank of all, a layer that is left out counting as none."""
        share = 1.0 if self.layers is None else len(self.layers) / num_layers
        return dataclasses.replace(self, r=max(1, math.ceil(self.r * share)), layers_to_transform=None)

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """As PEFT's, whose targets may be dotted suffixes; the vectors are in the folder, however they began."""
        own = {key: value for key, value in data.items() if key != "d_initial" or value != 0}
        targets = last_names(own.get("target_modules", ALL_LINEAR))
        layers = layers_of_folder(own, module_path(0, PROJECTIONS[0]))
        return {**own, "target_modules": targets, "layers_to_transform": layers, "init_weights": True}

    def to_peft(self, model: "LlamaForCausalLM", name: str) -> dict[str, Any]:
        """With every target by its name, as PEFT writes them."""
        return {**super().to_peft(model, name), "target_modules": list(self.targets)}


class VeraProjections(nn.Module):
    """The frozen random pair, one object for all that use it; the last of them takes it along.

    Args:
        vera_A: ``[R, I]`` for the widest input.
        vera_B: ``[O, R]`` for the widest output.
        key: that it was drawn from; None: it came out of a folder.
    """

    def __init__(self, vera_A: Tensor, vera_B: Tensor, key: int | None) -> None:
        super().__init__()
        # Not in any state_dict, which would list it once a layer.
        self.vera_A = nn.Buffer(vera_A, persistent=False)
        self.vera_B = nn.Buffer(vera_B, persistent=False)
        self.key_ = key


class Vera(LinearAdapter):
    """``Λ_b B Λ_d A`` on one projection, with its own part of the shared pair.

    Args:
        vera_lambda_b: ``[O]``.
        vera_lambda_d: ``[R]``.
        projections: the shared pair.
        in_features: I.
        dropout: probability of zeroing a feature of the input during training.
        seed: of the adapter's draws.
    """

    def __init__(
        self,
        vera_lambda_b: Tensor,
        vera_lambda_d: Tensor,
        projections: VeraProjections,
        in_features: int,
        *,
        dropout: float,
        seed: int,
    ) -> None:
        super().__init__(dropout=dropout, seed=seed)
        self.vera_lambda_b = nn.Parameter(vera_lambda_b)
        self.vera_lambda_d = nn.Parameter(vera_lambda_d)
        self.projections_ = projections
        self.in_features_ = in_features

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """A and ``Λ_b B Λ_d`` of this projection's widths."""
        pair = self.projections_
        # Both vectors on one side: what is kept for backward is then a copy of B alone, and A is the shared one.
        lambdas = self.vera_lambda_b[:, None] * self.vera_lambda_d  # [O, R]
        return pair.vera_A[:, : self.in_features_], lambdas * pair.vera_B[: lambdas.shape[0]]


def _projections_on(model: nn.Module) -> Iterator[VeraProjections]:
    return (module for module in model.modules() if isinstance(module, VeraProjections))


def _kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """float32, whatever the base: PEFT draws it so."""
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
