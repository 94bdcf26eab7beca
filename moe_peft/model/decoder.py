"""A decoder layer of the frozen LLaMA: norms, attention, feed-forward, and the adapters on them.

Letters: T tokens, D model, F ffn, H query heads, G key-value heads, d features per head, E experts.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_peft import ops
from moe_peft.model.attention import cached_attention, suffix_attention, varlen_attention
from moe_peft.model.config import LlamaConfig
from moe_peft.model.forward import ForwardBatch
from moe_peft.model.linear import AdapterDict, Linear, frozen_linear, project
from moe_peft.model.virtual_tokens import attention_behind_prefixes

RouterLogits = tuple[Tensor | None, ...]  # one entry a segment, [T_segment, E]


class LlamaRMSNorm(nn.Module):
    """Root-mean-square normalisation (https://arxiv.org/abs/1910.07467), statistics in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps_ = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` to the same shape and dtype."""
        return self.recomputable(x).value

    def recomputable(self, x: Tensor) -> ops.Recomputable:
        """The same, with what it takes to compute it again."""
        y, rstd = ops.rms_norm(x, self.weight, self.eps_)
        return ops.Recomputable(y, "rms_norm", (x, rstd, self.weight))


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

    def forward(self, x: Tensor | ops.Recomputable, batch: ForwardBatch) -> Tensor:
        """``[T, D]`` to ``[T, D]``; a token sees its own sample's past alone."""
        normed = x if isinstance(x, ops.Recomputable) else ops.Recomputable(x)
        q, k, v = self.queries_keys_values(normed, batch, batch)
        return self.o_proj(self.mixed(q, k, v, batch, batch), batch)

    def queries_keys_values(
        self, x: ops.Recomputable, batch: ForwardBatch, asking: ForwardBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries ``[T_asking, H, d]``, rotated keys and values ``[T, G, d]``."""
        head = (-1, self.config_.head_size)
        if asking is batch:
            projected = project(x, (self.q_proj, self.k_proj, self.v_proj), batch)
        else:
            projected = project(x.rows(asking.rows), (self.q_proj,), asking)
            projected += project(x, (self.k_proj, self.v_proj), batch)
        q, k, v = (features.unflatten(1, head) for features in projected)
        if self.config_.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return ops.rotary(q, asking.cos, asking.sin), ops.rotary(k, batch.cos, batch.sin), v

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch, asking: ForwardBatch) -> Tensor:
        """Every asking token's mixture of the values it sees, ``[T_asking, H * d]``."""
        window = self.config_.sliding_window
        if batch.cache is not None:
            mixed = cached_attention(q, k, v, batch.boundaries, window, batch.cache, self.layer_idx_)
        elif batch.runs:
            mixed = attention_behind_prefixes(q, k, v, batch, asking, window, self.layer_idx_)
        elif asking is batch:
            mixed = varlen_attention(q, k, v, batch.boundaries, window, batch.cu_seqlens)
        else:
            mixed = suffix_attention(q, k, v, asking.boundaries, batch.boundaries, window)
        return mixed.flatten(1)


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

    def forward(
        self, x: Tensor | ops.Recomputable, batch: ForwardBatch, answering: ForwardBatch | None = None
    ) -> tuple[Tensor, RouterLogits]:
        """``[T, D]`` to ``[T_answering, D]``, and the router logits of each segment's tokens.

        The frozen projections run once over all answering tokens, whatever the adapters do between them.

        Args:
            x: the layer's input.
            batch: of all its tokens; the routers see every one.
            answering: the tokens whose output is needed; None: all.
        """
        whole = x if isinstance(x, ops.Recomputable) else ops.Recomputable(x)
        answering = answering or batch
        rows = whole if answering is batch else whole.rows(answering.rows)
        gate, up = project(rows, (self.gate_proj, self.up_proj), answering)  # [T_answering, F]
        moes = [self.moes_.get(segment.adapter_name) for segment in batch.segments]
        if not any(moes):
            hidden = ops.Recomputable(ops.swiglu(gate, up), "swiglu", (gate, up))
            (y,) = project(hidden, (self.down_proj,), answering)
            return y, (None,) * len(moes)
        logits = [
            None if moe is None else moe.router_logits(seen, segment, batch)
            for moe, segment, seen in zip(moes, batch.segments, whole.split(_lengths(batch)), strict=True)
        ]
        runs = _runs(moes)
        lengths = [sum(_lengths(answering)[first:last]) for first, last in runs]
        mixed: list[Tensor] = []  # one entry a run
        deltas: list[Tensor | None] = []
        for (first, last), own, p1, p3 in zip(
            runs, rows.split(lengths), _split(gate, lengths), _split(up, lengths), strict=True
        ):
            if moes[first] is None:
                hidden_rows, delta = ops.swiglu(p1, p3), None
            else:
                parts = answering.segments[first:last]
                seen_logits = [one for one in logits[first:last] if one is not None]
                if answering is not batch:
                    kept = [answering.rows_within(part) for part in parts]
                    seen_logits = [
                        one if at is None else one.index_select(0, at)
                        for one, at in zip(seen_logits, kept, strict=True)
                    ]
                beside = moes[first + 1 : last]
                hidden_rows, delta = moes[first](own, p1, p3, _join(seen_logits), parts, answering, beside)
            mixed.append(hidden_rows)
            deltas.append(delta)
        y = self.down_proj(_join(mixed), answering)  # [T_answering, D]
        pieces = zip(_split(y, lengths), deltas, strict=True)
        return _join([own if delta is None else own + delta for own, delta in pieces]), tuple(logits)


def _runs(moes: list[Any]) -> list[tuple[int, int]]:
    """First and behind the last of neighbours that run together: mixtures of one layout, or segments without any."""
    layouts = [None if moe is None else moe.layout for moe in moes]
    runs, first = [], 0
    for _, group in itertools.groupby(layouts):
        last = first + len(list(group))
        runs.append((first, last))
        first = last
    return runs


def _lengths(batch: ForwardBatch) -> list[int]:
    return [segment.end - segment.start for segment in batch.segments]


def _split(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """As ``Tensor.split``, whose backward copies, even a single piece."""
    return (x,) if len(lengths) == 1 else x.split(lengths)


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
        # What adapters do to either sublayer's output before it joins the residual: [n, D] to [n, D].
        self.behind_attn_ = AdapterDict()
        self.behind_mlp_ = AdapterDict()

    def forward(
        self,
        x: Tensor,
        batch: ForwardBatch,
        asking: ForwardBatch | None = None,
        answering: ForwardBatch | None = None,
    ) -> tuple[Tensor, RouterLogits]:
        """``[T, D]`` to ``[T_answering, D]``, and the router logits of each segment's asking tokens.

        Args:
            x: the residual stream.
            batch: of all tokens, each of which gives keys and values.
            asking: those whose attention is needed, ``batch`` narrowed; None: all.
            answering: those whose output is needed, ``asking`` narrowed; None: all that ask.
        """
        asking = asking or batch
        run = recompute_in_backward if batch.recompute_around_attention else _call
        q, k, v = run(self._before_attention, x, batch, asking)
        mixed = self.self_attn.mixed(q, k, v, batch, asking)  # [T_asking, H * d]
        y, router_logits = run(self._behind_attention, x, mixed, batch, asking, answering or asking)
        return y, router_logits

    def _before_attention(self, x: Tensor, batch: ForwardBatch, asking: ForwardBatch) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.queries_keys_values(self.input_layernorm.recomputable(x), batch, asking)

    def _behind_attention(
        self, x: Tensor, mixed: Tensor, batch: ForwardBatch, asking: ForwardBatch, answering: ForwardBatch
    ) -> tuple[Tensor, RouterLogits]:
        own = _rows(x, asking, batch)
        own = own + _behind(self.behind_attn_, self.self_attn.o_proj(mixed, asking), asking)
        fed, router_logits = self.mlp(self.post_attention_layernorm.recomputable(own), asking, answering)
        return _rows(own, answering, asking) + _behind(self.behind_mlp_, fed, answering), router_logits


def _behind(adapters: AdapterDict, y: Tensor, batch: ForwardBatch) -> Tensor:
    """A sublayer's output ``[T, D]``, each segment's rows through what its adapter has there."""
    own = [adapters.get(segment.task) for segment in batch.segments]
    if not any(module is not None for module in own):
        return y
    pieces = zip(batch.segments, y.split(_lengths(batch)), own, strict=True)
    return torch.cat([rows if module is None else module(rows, segment, batch) for segment, rows, module in pieces])


def _rows(x: Tensor, part: ForwardBatch, batch: ForwardBatch) -> Tensor:
    """The part's tokens of the batch's; by ``index_select``, whose backward is far faster than that of ``x[rows]``."""
    return x if part is batch or part.rows is None else x.index_select(0, part.rows)


def recompute_in_backward(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it and keep its arguments alone; backward calls it again (https://arxiv.org/abs/1604.06174).

    No random state is kept: every draw is a function of its key.
    """
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
