"""MixLoRA: a router sends every token to its top-k LoRA experts on a shared frozen FFN (https://arxiv.org/abs/2404.15159).

Letters: N tokens of one adapter, D model, F ffn, E experts, K top-k, R rank.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from moe_peft import ops, strict
from moe_peft.adapters.expert_lora import ExpertLoraConfig
from moe_peft.adapters.lora import (
    ATTENTION_PROJECTIONS,
    FFN_PROJECTIONS,
    PLAIN_INITS,
    LoraConfig,
    lora_weights,
    target_linears,
)
from moe_peft.adapters.method import NamedWeight
from moe_peft.adapters.router_losses import AUX_LOSS_TYPES, router_loss, z_loss
from moe_peft.model.batch import Segment, expert_name
from moe_peft.model.draws import generator_for, uniform_noise
from moe_peft.model.forward import ForwardBatch
from moe_peft.model.linear import LinearAdapter, wide_dtype

if TYPE_CHECKING:
    from moe_peft.model.decoder import LlamaMLP
    from moe_peft.model.llama import LlamaForCausalLM

MAX_EXPERTS = 64


@dataclass(frozen=True, kw_only=True)
class MixLoraConfig(LoraConfig):
    """Settings of a MixLoRA adapter: LoRA on the attention targets, experts on the gate, up and down targets.

    Raises:
        ValueError: on a value outside its rule, or target modules without a feed-forward projection.
    """

    num_experts: int = field(default=8, metadata={"help": f"experts a layer, 1..{MAX_EXPERTS}"})
    top_k: int = field(default=2, metadata={"help": "experts a token goes to, 1..num_experts"})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "weight of the load-balancing loss"})
    router_aux_loss_type: str = field(default="balance", metadata={"help": f"one of {', '.join(AUX_LOSS_TYPES)}"})
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "weight of mean(logsumexp(router logits)^2)"})
    router_init_range: float = field(default=0.02, metadata={"help": "std of the router's first weights"})
    router_jitter_noise: float = field(
        default=0.0, metadata={"help": "in training the router's input is scaled by a draw from 1-noise..1+noise"}
    )
    expert_lora: ExpertLoraConfig | None = field(
        default=None,
        metadata={"help": "r, lora_alpha, lora_dropout, use_rslora, init_lora_weights of experts that differ in them"},
    )

    peft_type: ClassVar[str] = "MIXLORA"
    has_router: ClassVar[bool] = True
    inits: ClassVar[tuple[str, ...]] = PLAIN_INITS
    refused: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern", "layers_to_transform")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise ValueError(f"num_experts={self.num_experts} must be in 1..{MAX_EXPERTS}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be in 1..num_experts={self.num_experts}")
        if self.router_aux_loss_type not in AUX_LOSS_TYPES:
            raise ValueError(
                f"router_aux_loss_type={self.router_aux_loss_type!r} must be one of {', '.join(AUX_LOSS_TYPES)}"
                f"{strict.did_you_mean(self.router_aux_loss_type, AUX_LOSS_TYPES)}"
            )
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_init_range"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and finite")
        if not 0 <= self.router_jitter_noise < 1:
            raise ValueError(f"router_jitter_noise={self.router_jitter_noise} must be in [0, 1)")
        if not self.expert_targets:
            raise ValueError(
                f"target_modules={list(self.targets)} must name at least one of {', '.join(FFN_PROJECTIONS)}: "
                "a mixture without experts is plain LoRA"
            )
        _ = self.expert_factors  # refuses what it cannot be made of

    @property
    def attention_targets(self) -> tuple[str, ...]:
        """Target projections that carry plain LoRA."""
        return tuple(name for name in self.targets if name in ATTENTION_PROJECTIONS)

    @property
    def expert_targets(self) -> tuple[str, ...]:
        """Target projections that carry experts."""
        return tuple(name for name in self.targets if name in FFN_PROJECTIONS)

    @property
    def expert_factors(self) -> LoraConfig:
        """Settings of the experts' factors: the adapter's own, with what ``expert_lora`` changes."""
        return (self.expert_lora or ExpertLoraConfig()).over(self)

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put LoRA on attention, and a router with its experts on every feed-forward layer."""
        for layer_idx, projection, linear in target_linears(model, self.attention_targets):
            linear.loras_[name] = self.new_lora(linear, seed, name, layer_idx, projection)
        for layer_idx, layer in enumerate(model.decoder_layers):
            mixture = MixLora(self, layer.mlp, seed, name, layer_idx)
            layer.mlp.moes_[name] = mixture
            for projection in self.expert_targets:
                loras = getattr(layer.mlp, projection).loras_
                for expert in range(self.num_experts):
                    loras[expert_name(name, expert)] = ExpertLora(mixture.stack_of(projection), expert)

    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """Checkpoint names with the parameter that holds each weight, and the expert's place in a stack."""
        for layer_idx, layer in enumerate(model.decoder_layers):
            prefix = f"mixlora.layers.{layer_idx}"
            for projection in self.attention_targets:
                linear = getattr(layer.self_attn, projection)
                yield from lora_weights(linear, name, f"{prefix}.self_attn.{projection}")
            mixture = layer.mlp.moes_[name]
            yield f"{prefix}.mlp.moe_gate.weight", mixture.gate_.weight, None
            for projection in self.expert_targets:
                stack = mixture.stack_of(projection)
                for expert in range(self.num_experts):
                    for factor in ("lora_A", "lora_B"):
                        key = f"{prefix}.mlp.{projection}.experts.{expert}.{factor}.weight"
                        yield key, getattr(stack, factor), expert

    def is_router(self, key: str) -> bool:
        """Whether a checkpoint name is a router's weight."""
        return key.endswith(".moe_gate.weight")

    def expert_counts(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """How many tokens every expert got, LongTensor ``[routed layers, E]``."""
        chosen = [ops.route(logits.detach(), self.top_k)[1].flatten() for logits in router_logits]
        return torch.stack([torch.bincount(experts, minlength=self.num_experts) for experts in chosen])

    def aux_loss(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """The router losses of one forward times their coefficients, scalar."""
        balance = router_loss(router_logits, self.top_k, self.router_aux_loss_type)
        return self.router_aux_loss_coef * balance + self.router_z_loss_coef * z_loss(router_logits)


class LoraStack(nn.Module):
    """The factors of all experts on one projection: ``lora_A`` ``[E, R, in]``, ``lora_B`` ``[E, out, R]``."""

    def __init__(self, lora_a: Tensor, lora_b: Tensor, *, scaling: float, dropout: float, seed: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_a)
        self.lora_B = nn.Parameter(lora_b)
        self.scaling_ = scaling
        self.dropout_ = dropout
        self.seed_ = seed


class ExpertLora(LinearAdapter):
    """One expert of a stack, seen as a ``Lora``: its factors are views, so it owns no parameter."""

    def __init__(self, stack: LoraStack, expert: int) -> None:
        super().__init__(scaling=stack.scaling_, dropout=stack.dropout_, seed=stack.seed_)
        self._stack = (stack,)  # in a tuple: the stack is registered once, in the mixture
        self.expert_ = expert

    @property
    def lora_A(self) -> Tensor:  # noqa: N802 (the name every LoRA uses)
        """``[R, in]``."""
        return self._stack[0].lora_A[self.expert_]

    @property
    def lora_B(self) -> Tensor:  # noqa: N802
        """``[out, R]``."""
        return self._stack[0].lora_B[self.expert_]

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """The views."""
        return self.lora_A, self.lora_B


class MixLora(nn.Module):
    """Router and experts of one feed-forward layer."""

    def __init__(self, config: MixLoraConfig, mlp: "LlamaMLP", seed: int, name: str, layer_idx: int) -> None:
        super().__init__()
        own = config.expert_factors
        self.top_k_ = config.top_k
        self.jitter_noise_ = config.router_jitter_noise
        self.dropout_ = own.lora_dropout
        self.scaling_ = own.scaling
        self.seed_ = seed
        self.layer_idx_ = layer_idx
        base = mlp.gate_proj.base_layer_.weight
        # On meta first: nn.Linear would draw its own init from the global RNG.
        self.gate_ = nn.Linear(base.shape[1], config.num_experts, bias=False, device="meta")
        generator = generator_for(seed, name, "init", layer_idx, "router")
        router = torch.empty(config.num_experts, base.shape[1], dtype=wide_dtype(base.dtype))
        router.normal_(std=config.router_init_range, generator=generator)
        self.gate_.weight = nn.Parameter(router.to(base.device))
        self.stacks_ = nn.ModuleDict()
        for projection in config.expert_targets:
            linear = getattr(mlp, projection)
            factors = own.initial_factors(linear, (config.num_experts,), seed, name, layer_idx, projection)
            self.stacks_[projection] = LoraStack(*factors, scaling=own.scaling, dropout=own.lora_dropout, seed=seed)

    def stack_of(self, projection: str) -> LoraStack:
        """The stack of one projection."""
        stack = self.stacks_[projection]
        assert isinstance(stack, LoraStack)
        return stack

    def router_logits(self, x: ops.Recomputable, segment: Segment, batch: ForwardBatch) -> Tensor:
        """``[N, D]``, the layer's input, to ``[N, E]`` in at least float32."""
        logits: Tensor = ops.wide_linear(self._jittered(x, segment, batch), self.gate_.weight)
        return logits if batch.replay is None else batch.replay.routed(self.layer_idx_, logits, self.top_k_)

    @property
    def layout(self) -> tuple[object, ...]:
        """Mixtures that agree in it can run together: top-k, and the experts' number and rank on each projection."""
        shapes = [(name, *factors.lora_a.shape[:2]) for name, factors in self.factors.items()]
        return self.top_k_, *sorted(shapes)

    def forward(
        self,
        x: ops.Recomputable,
        gate: Tensor,
        up: Tensor,
        router_logits: Tensor,
        segments: Sequence[Segment],
        batch: ForwardBatch,
        beside: Sequence["MixLora"] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the experts of this adapter's tokens, and of its neighbours', each adapter's with its own.

        Args:
            x: the layer's input, ``[T, D]``, and how to compute it again.
            gate: frozen gate projection of x, ``[T, F]``.
            up: frozen up projection of x, ``[T, F]``.
            router_logits: ``[T, E]``.
            segments: each adapter's tokens, this one's first.
            batch: the forward they belong to.
            beside: the mixtures of the other segments, of the same layout.

        Returns:
            Hidden features ``[T, F]`` for the frozen down projection, and what the down experts add behind it
            ``[T, D]`` (None without down experts).
        """
        gates, experts = ops.route(router_logits, self.top_k_)
        return _mixlora_forward((self, *beside), x, gate, up, gates, experts, segments, batch)

    @property
    def factors(self) -> dict[str, ops.ExpertFactors]:
        """The stacks' factors by projection."""
        return {name: ops.ExpertFactors(stack.lora_A, stack.lora_B) for name, stack in self.stacks_.items()}

    def mask(self, input_name: str, like: Tensor, segment: Segment, batch: ForwardBatch) -> Tensor | None:
        """Dropout mask of the experts' input."""
        return batch.dropout_mask(segment, self.seed_, self.dropout_, self.layer_idx_, input_name, like)

    def _jittered(self, x: ops.Recomputable, segment: Segment, batch: ForwardBatch) -> ops.Recomputable:
        if not batch.training or self.jitter_noise_ == 0.0:
            return x
        key = batch.draw_key(segment, self.seed_, "jitter", self.layer_idx_)
        wide = x.value.to(self.gate_.weight.dtype)
        low, high = 1 - self.jitter_noise_, 1 + self.jitter_noise_
        noise = batch.drawn_rows(
            segment, lambda rows: uniform_noise((rows, wide.shape[1]), low, high, like=wide, key=key)
        )
        return ops.Recomputable(wide * noise)


def _mixlora_forward(
    mixtures: Sequence[MixLora],
    x: ops.Recomputable,
    gate: Tensor,
    up: Tensor,
    gates: Tensor,
    experts: Tensor,
    segments: Sequence[Segment],
    batch: ForwardBatch,
) -> tuple[Tensor, Tensor | None]:
    parts, downs = [], []
    for mixture, segment in zip(mixtures, segments, strict=True):
        stacks = mixture.factors
        of_gate, of_up, down = (stacks.get(name) for name in FFN_PROJECTIONS)
        x_mask = mixture.mask("mlp_in", x.value, segment, batch) if of_gate or of_up else None
        h_mask = mixture.mask("mlp_hidden", gate, segment, batch) if down else None
        length, down_a = segment.end - segment.start, down.lora_a if down else None
        parts.append(ops.FfnPart(length, of_gate, of_up, down_a, mixture.scaling_, x_mask, h_mask))
        downs += [down] if down else []
    return ops.mixlora_ffn_group(x, gate, up, gates, experts, parts, downs)
