"""The frozen LLaMA with adapters, from token ids to losses.

Letters: T tokens, D model, F ffn, H query heads, G key-value heads, d features per head, V vocabulary, E experts,
N rows with a label.
"""

import itertools

import torch
from torch import Tensor, nn

from moe_peft import ops
from moe_peft.model.attention import cached_attention, varlen_attention
from moe_peft.model.batch import (
    IGNORE_INDEX,
    ModelInput,
    ModelOutput,
    Segment,
    segments_of,
)
from moe_peft.model.cache import KVCache
from moe_peft.model.config import LlamaConfig
from moe_peft.model.forward import ForwardBatch
from moe_peft.model.host import AdapterHost
from moe_peft.model.linear import AdapterDict, Linear, frozen_linear, wide_dtype
from moe_peft.model.rope import apply_rotary, rotary_table

RouterLogits = tuple[Tensor | None, ...]  # one entry a segment, [T_segment, E]


class LlamaEmbedding(nn.Module):
    """The frozen token table ``[V, D]``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size), requires_grad=False)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids ``[T]`` to features ``[T, D]``."""
        return nn.functional.embedding(input_ids, self.weight)


class LlamaRMSNorm(nn.Module):
    """Root-mean-square normalisation (https://arxiv.org/abs/1910.07467), statistics in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps_ = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` to the same shape and dtype."""
        wide = x.to(wide_dtype(x.dtype))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps_)
        return self.weight * (wide * scale).to(x.dtype)


class LlamaAttention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config_ = config
        self.layer_idx_ = layer_idx
        model, head = config.hidden_size, config.head_size
        queries, keys = config.num_attention_heads * head, config.num_kv_heads * head
        qkv_bias = config.attention_bias or config.qkv_bias

        def linear(in_features: int, out_features: int, bias: bool, input_name: str) -> Linear:
            base_layer = frozen_linear(in_features, out_features, bias=bias)
            return Linear(base_layer, layer_idx=layer_idx, input_name=input_name)

        self.q_proj = linear(model, queries, qkv_bias, "attn_in")
        self.k_proj = linear(model, keys, qkv_bias, "attn_in")
        self.v_proj = linear(model, keys, qkv_bias, "attn_in")
        self.o_proj = linear(queries, model, config.attention_bias, "attn_out")
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(head, config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(head, config.rms_norm_eps)

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """``[T, D]`` to ``[T, D]``; a token sees its own sample's past alone."""
        head = (-1, self.config_.head_size)
        q = self.q_proj(x, batch).unflatten(1, head)  # [T, H, d]
        k = self.k_proj(x, batch).unflatten(1, head)  # [T, G, d]
        v = self.v_proj(x, batch).unflatten(1, head)
        if self.config_.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, batch.cos, batch.sin), apply_rotary(k, batch.cos, batch.sin)
        window = self.config_.sliding_window
        if batch.cache is None:
            mixed = varlen_attention(q, k, v, batch.boundaries, window)
        else:
            mixed = cached_attention(q, k, v, batch.boundaries, window, batch.cache, self.layer_idx_)
        return self.o_proj(mixed.flatten(1), batch)


class LlamaMLP(nn.Module):
    """The SwiGLU feed-forward layer; an adapter may bring its own way through it in ``moes_``."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        model, ffn = config.hidden_size, config.intermediate_size

        def linear(in_features: int, out_features: int, input_name: str) -> Linear:
            base_layer = frozen_linear(in_features, out_features, bias=config.mlp_bias)
            return Linear(base_layer, layer_idx=layer_idx, input_name=input_name)

        self.gate_proj = linear(model, ffn, "mlp_in")
        self.up_proj = linear(model, ffn, "mlp_in")
        self.down_proj = linear(ffn, model, "mlp_hidden")
        self.moes_ = AdapterDict()

    def forward(self, x: Tensor, batch: ForwardBatch) -> tuple[Tensor, RouterLogits]:
        """``[T, D]`` to ``[T, D]`` and each segment's router logits.

        The frozen projections run once over all tokens, whatever the adapters do between them.
        """
        gate = self.gate_proj(x, batch)  # [T, F]
        up = self.up_proj(x, batch)
        moes = [self.moes_.get(segment.adapter_name) for segment in batch.segments]
        if not any(moes):
            return self.down_proj(nn.functional.silu(gate) * up, batch), (None,) * len(moes)
        hidden: list[Tensor] = []
        deltas: list[Tensor | None] = []
        router_logits: list[Tensor | None] = []
        for segment, moe in zip(batch.segments, moes, strict=True):
            rows = slice(segment.start, segment.end)
            if moe is None:
                hidden.append(nn.functional.silu(gate[rows]) * up[rows])
                deltas.append(None)
                router_logits.append(None)
            else:
                mixed, delta, logits = moe(x[rows], gate[rows], up[rows], segment, batch)
                hidden.append(mixed)
                deltas.append(delta)
                router_logits.append(logits)
        y = self.down_proj(_join(hidden), batch)  # [T, D]
        pieces = [
            y[segment.start : segment.end] if delta is None else y[segment.start : segment.end] + delta
            for segment, delta in zip(batch.segments, deltas, strict=True)
        ]
        return _join(pieces), tuple(router_logits)


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class LlamaDecoderLayer(nn.Module):
    """Attention, then the feed-forward layer, each behind a norm and beside a residual."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, batch: ForwardBatch) -> tuple[Tensor, RouterLogits]:
        """``[T, D]`` to ``[T, D]`` and the router logits of each segment."""
        x = x + self.self_attn(self.input_layernorm(x), batch)
        mixed, router_logits = self.mlp(self.post_attention_layernorm(x), batch)
        return x + mixed, router_logits


class LlamaForCausalLM(AdapterHost):
    """A frozen LLaMA-family model that carries many adapters.

    Args:
        config: the model's shape. The weights are random until a loader fills them.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config_ = config
        self.source_ = ""  # where a loader took the weights from
        self.embed_tokens = LlamaEmbedding(config)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head_ = frozen_linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head_.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the base weights live."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The base weights' dtype."""
        return self.norm.weight.dtype

    @property
    def decoder_layers(self) -> list[LlamaDecoderLayer]:
        """The layers, bottom first."""
        return [layer for layer in self.layers if isinstance(layer, LlamaDecoderLayer)]

    def forward(
        self,
        model_input: ModelInput,
        *,
        return_logits: bool = False,
        last_logits_only: bool = False,
        cache: KVCache | None = None,
    ) -> list[ModelOutput]:
        """Run the fused batch.

        Args:
            model_input: tokens, boundaries, adapters' runs and labels.
            return_logits: give logits although there are labels.
            last_logits_only: logits of each sample's last token only, ``[samples, V]``.
            cache: keys and values of earlier tokens; it takes up this batch's.

        Returns:
            One output a batch config, in order.

        Raises:
            ValueError: on a batch config that names an adapter or expert which is not attached, or on a token or label
                outside the vocabulary.
        """
        segments = segments_of(model_input)
        for segment in segments:
            self._check_attached(segment)
        batch = self._forward_batch(model_input, segments, cache)
        input_ids = model_input.input_ids
        if input_ids.min() < 0 or input_ids.max() >= self.config_.vocab_size:
            raise ValueError(f"input_ids must be in 0..vocab_size-1={self.config_.vocab_size - 1}")
        hidden = self.embed_tokens(input_ids.to(self.device))  # [T, D]
        layers_router_logits = []
        for layer in self.layers:
            hidden, router_logits = layer(hidden, batch)
            layers_router_logits.append(router_logits)
        if cache is not None:
            cache.advance(model_input.boundaries_)
        hidden = self.norm(hidden)

        losses = self._losses(hidden, model_input, segments)
        wants_logits = return_logits or model_input.labels is None
        outputs = []
        for i, segment in enumerate(segments):
            loss, num_supervised = losses[i]
            routed = tuple(logits[i] for logits in layers_router_logits if logits[i] is not None)
            aux_loss = self.adapters_[segment.task].aux_loss(routed) if routed else torch.zeros_like(loss)
            outputs.append(
                ModelOutput(
                    adapter_name=segment.adapter_name,
                    loss=loss,
                    aux_loss=aux_loss,
                    logits=self._logits(hidden, batch, segment, last_logits_only) if wants_logits else None,
                    router_logits=routed or None,
                    num_supervised_tokens=num_supervised,
                )
            )
        return outputs

    def _check_attached(self, segment: Segment) -> None:
        if segment.adapter_name == "":
            return
        self.adapter_config(segment.task)
        if segment.adapter_name != segment.task and not any(
            segment.adapter_name in module for module in self.modules() if isinstance(module, AdapterDict)
        ):
            raise ValueError(f"adapter {segment.task!r} has no expert {segment.adapter_name!r}")

    def _forward_batch(
        self, model_input: ModelInput, segments: tuple[Segment, ...], cache: KVCache | None
    ) -> ForwardBatch:
        edges = model_input.boundaries_
        new = [end - start for start, end in itertools.pairwise(edges)]
        if cache is not None and len(cache.lengths_) != len(new):
            raise ValueError(f"the batch has {len(new)} samples, but the cache holds {len(cache.lengths_)}")
        past = cache.lengths_ if cache is not None else [0] * len(new)
        double = self.dtype == torch.float64
        cos, sin = rotary_table(self.config_, past, new, device=self.device, double=double)
        return ForwardBatch(segments, edges, cos, sin, self.training, cache)

    def _losses(
        self, hidden: Tensor, model_input: ModelInput, segments: tuple[Segment, ...]
    ) -> list[tuple[Tensor, int]]:
        """Mean loss and number of supervised tokens of each segment."""
        if model_input.labels is None:
            return [(hidden.new_zeros((), dtype=wide_dtype(hidden.dtype)), 0) for _ in segments]
        targets = _next_tokens(model_input, model_input.labels).to(self.device)  # [T]
        rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # [N]
        row_targets = targets[rows]
        if rows.numel() and (row_targets.min() < 0 or row_targets.max() >= self.config_.vocab_size):
            raise ValueError(f"labels must be {IGNORE_INDEX} or in 0..vocab_size-1={self.config_.vocab_size - 1}")
        nll = ops.linear_cross_entropy(hidden[rows], self.lm_head_.weight, row_targets)  # [N]
        edges = torch.tensor([segment.start for segment in segments] + [segments[-1].end], device=rows.device)
        bounds = torch.searchsorted(rows, edges).tolist()
        return [(nll[start:end].sum() / max(end - start, 1), end - start) for start, end in itertools.pairwise(bounds)]

    def _logits(self, hidden: Tensor, batch: ForwardBatch, segment: Segment, last_only: bool) -> Tensor:
        rows = hidden[segment.start : segment.end]
        if last_only:
            lasts = [end - 1 - segment.start for end in batch.boundaries if segment.start < end <= segment.end]
            rows = rows[lasts]
        logits: Tensor = self.lm_head_(rows)
        return logits


def _next_tokens(model_input: ModelInput, labels: Tensor) -> Tensor:
    """Labels shifted so that each position holds the token it predicts; a sample's last position predicts nothing."""
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:-1] = labels[1:]
    targets[torch.tensor(model_input.boundaries_[1:], device=labels.device) - 1] = IGNORE_INDEX
    return targets
