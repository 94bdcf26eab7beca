"""The frozen LLaMA with adapters, from token ids to losses.

Letters: T tokens, D model, V vocabulary, N rows with a label.
"""

import bisect
import itertools
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_peft import ops, strict
from moe_peft.model.batch import ModelInput, ModelOutput, Segment, segments_of
from moe_peft.model.cache import KVCache
from moe_peft.model.config import LlamaConfig
from moe_peft.model.decoder import LlamaDecoderLayer, LlamaRMSNorm, RouterLogits, recompute_in_backward
from moe_peft.model.forward import ForwardBatch
from moe_peft.model.host import AdapterHost
from moe_peft.model.linear import AdapterDict, frozen_linear, wide_dtype
from moe_peft.model.rope import rotary_table
from moe_peft.model.targets import Targets
from moe_peft.model.virtual_tokens import (
    AttentionRun,
    embedded_with,
    num_before,
    owners_of,
    prefix_runs,
    with_virtual_tokens,
    without_virtual_tokens,
)

LONG_SAMPLE = 256  # tokens from which attention over a whole sample is worth a launch of its own
ACTIVATION_CHECKPOINTING = ("none", "full", "selective")


class LlamaEmbedding(nn.Module):
    """The frozen token table ``[V, D]``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size), requires_grad=False)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids ``[T]`` to features ``[T, D]``."""
        return nn.functional.embedding(input_ids, self.weight)


class LlamaForCausalLM(AdapterHost):
    """A frozen LLaMA-family model that carries many adapters.

    With ``activation_checkpointing_`` (one of ``ACTIVATION_CHECKPOINTING``) training keeps less for backward: "full"
    keeps a layer's input and computes the layer again, "selective" keeps attention too, the costliest part for its
    bytes. Losses and gradients are the same to the bit.

    Args:
        config: the model's shape. The weights are random until a loader fills them.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config_ = config
        self.source_ = ""  # where a loader took the weights from
        self.activation_checkpointing_ = "none"
        self.embed_tokens = LlamaEmbedding(config)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head_ = frozen_linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head_.weight = self.embed_tokens.weight
        # What adapters put before each of their samples: embeddings, or keys and values of every layer.
        self.prompts_ = AdapterDict()
        self.prefixes_ = AdapterDict()

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
            ValueError: on a batch config that names an adapter or expert which is not attached, or that cannot run
                while another is merged; or on a token or label outside the vocabulary.
        """
        segments = segments_of(model_input)
        for segment in segments:
            self._check_attached(segment)
        input_ids = model_input.input_ids
        if input_ids.min() < 0 or input_ids.max() >= self.config_.vocab_size:
            raise ValueError(f"input_ids must be in 0..vocab_size-1={self.config_.vocab_size - 1}")
        past = _past_lengths(model_input, cache)
        num_virtual = num_before(owners_of(model_input, segments, self.prompts_), past)
        whole = with_virtual_tokens(model_input, num_virtual)
        segments = segments_of(whole)
        batch = self._forward_batch(whole, self._without_merged(segments), cache)
        targets = Targets.of(whole, self.config_.vocab_size)
        wants_logits = return_logits or targets is None
        hidden = self.embed_tokens(input_ids.to(self.device))  # [T, D]
        hidden = embedded_with(self.prompts_, hidden, num_virtual, model_input.boundaries_, batch)
        narrowed = self._narrowed(batch, targets) if targets is not None and not wants_logits and not cache else None
        hidden, layers_router_logits = self._run_layers(hidden, batch, narrowed)
        if cache is not None:
            cache.advance(whole.boundaries_)
        hidden = self.norm(hidden)  # [T, D], or the rows that the last layer answered

        losses = self._losses(hidden, targets, segments, narrowed[1] if narrowed else batch)
        outputs = []
        for i, segment in enumerate(segments):
            loss, num_supervised = losses[i]
            of_layers = (logits[i] for logits in layers_router_logits)
            routed = tuple(logits for logits in of_layers if logits is not None)
            aux_loss = self.adapters_[segment.task].aux_loss(routed) if routed else torch.zeros_like(loss)
            penalty = None
            if segment.task and targets is not None:
                penalty = self.adapters_[segment.task].penalty(self, segment.task)
            outputs.append(
                ModelOutput(
                    adapter_name=segment.adapter_name,
                    loss=loss,
                    aux_loss=aux_loss if penalty is None else aux_loss + penalty,
                    logits=(
                        self._logits(hidden, batch, segment, num_virtual, last_logits_only) if wants_logits else None
                    ),
                    router_logits=routed or None,
                    num_supervised_tokens=num_supervised,
                )
            )
        return outputs

    def _check_attached(self, segment: Segment) -> None:
        if segment.adapter_name == "":
            return
        self.check_runnable(segment.task, training=self.training)
        if segment.adapter_name != segment.task and not any(
            segment.adapter_name in module for module in self.modules() if isinstance(module, AdapterDict)
        ):
            raise ValueError(f"adapter {segment.task!r} has no expert {segment.adapter_name!r}")

    def _without_merged(self, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """A merged adapter's tokens as the bare base's, which holds the adapter already."""
        merged = self.merged_adapter
        return tuple(
            replace(segment, adapter_name="", task="") if segment.task == merged else segment for segment in segments
        )

    def _forward_batch(
        self, model_input: ModelInput, segments: tuple[Segment, ...], cache: KVCache | None
    ) -> ForwardBatch:
        edges = model_input.boundaries_
        new = [end - start for start, end in itertools.pairwise(edges)]
        config, past = self.config_, _past_lengths(model_input, cache)
        runs: tuple[AttentionRun, ...] = ()
        if not all(past):  # the samples that begin here do so behind their adapter's prefix
            shape = (config.num_hidden_layers, 2, config.num_kv_heads, config.head_size)
            runs = prefix_runs(self.prefixes_, segments, edges, shape, like=self.norm.weight)
        for run in runs:
            for sample in range(run.first, run.last):
                if run.prefix is not None and not past[sample]:
                    past[sample] = run.num_before
                    if cache is not None:
                        cache.begin(sample, run.prefix)
        mode = self.activation_checkpointing_
        if mode not in ACTIVATION_CHECKPOINTING:
            close = strict.did_you_mean(mode, ACTIVATION_CHECKPOINTING)
            raise ValueError(
                f"activation_checkpointing_={mode!r} must be one of {', '.join(ACTIVATION_CHECKPOINTING)}{close}"
            )
        double = self.dtype == torch.float64
        cos, sin = rotary_table(self.config_, past, new, device=self.device, double=double)
        selective = mode == "selective" and self.training and torch.is_grad_enabled()
        on_gpu = self.device.type == "cuda"
        cu_seqlens = model_input.cu_seqlens.to(self.device, torch.int32, non_blocking=True) if on_gpu else None
        return ForwardBatch(segments, edges, cos, sin, self.training, cache, cu_seqlens, selective, runs=runs)

    def _narrowed(self, batch: ForwardBatch, targets: Targets) -> tuple[ForwardBatch, ForwardBatch]:
        """Whose attention and whose output the last layer needs: the tokens from a sample's first target on.

        A router's losses are over every token, so a mixture's tokens all go through attention.
        """
        moes = self.decoder_layers[-1].mlp.moes_
        routed = [moes.get(segment.adapter_name) is not None for segment in batch.segments]
        ends = [segment.end for segment in batch.segments]
        firsts = targets.firsts
        asking_firsts = [
            0 if routed[bisect.bisect_left(ends, end)] else first
            for end, first in zip(batch.boundaries[1:], firsts, strict=True)
        ]
        # Over long samples, one launch for all beats a masked one a sample, unless that has far less to do.
        longest = max(end - start for start, end in itertools.pairwise(batch.boundaries))
        alike = ops.is_batch_invariant()  # then neighbours decide nothing
        few_dropped = longest > LONG_SAMPLE and sum(asking_firsts) < batch.boundaries[-1] / 2 and not alike
        if self.device.type != "cpu" or few_dropped:
            asking_firsts = [0] * len(firsts)
        asking = batch.narrowed(asking_firsts, always=alike)
        rest = [first - asked for first, asked in zip(firsts, asking_firsts, strict=True)]
        return asking, asking.narrowed(rest, always=alike)

    def _run_layers(
        self, hidden: Tensor, batch: ForwardBatch, narrowed: tuple[ForwardBatch, ForwardBatch] | None
    ) -> tuple[Tensor, list[RouterLogits]]:
        recompute = self.activation_checkpointing_ == "full" and self.training and torch.is_grad_enabled()
        layers_router_logits: list[RouterLogits] = []
        for i, layer in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            arguments = (hidden, batch, *narrowed) if narrowed and is_last else (hidden, batch)
            hidden, router_logits = recompute_in_backward(layer, *arguments) if recompute else layer(*arguments)
            layers_router_logits.append(router_logits)
        return hidden, layers_router_logits

    def _losses(
        self, hidden: Tensor, targets: Targets | None, segments: tuple[Segment, ...], answered: ForwardBatch
    ) -> list[tuple[Tensor, int]]:
        """Mean loss and number of supervised tokens of each segment."""
        if targets is None:
            return [(hidden.new_zeros((), dtype=wide_dtype(hidden.dtype)), 0) for _ in segments]
        rows, ids = (host.to(self.device, non_blocking=True) for host in (targets.rows_within(answered), targets.ids))
        nll = ops.linear_cross_entropy(hidden.index_select(0, rows), self.lm_head_.weight, ids)  # [N]
        bounds = targets.bounds([segment.start for segment in segments] + [segments[-1].end])
        return [(nll[start:end].sum() / max(end - start, 1), end - start) for start, end in itertools.pairwise(bounds)]

    def _logits(
        self, hidden: Tensor, batch: ForwardBatch, segment: Segment, num_virtual: list[int], last_only: bool
    ) -> Tensor:
        rows = hidden[segment.start : segment.end]
        first, last = (bisect.bisect_left(batch.boundaries, edge) for edge in (segment.start, segment.end))
        if last_only:
            rows = rows[[end - 1 - segment.start for end in batch.boundaries[first + 1 : last + 1]]]
        else:
            rows = without_virtual_tokens(rows, num_virtual[first:last], batch.boundaries[first : last + 1])
        logits: Tensor = self.lm_head_(rows)
        return logits


def _past_lengths(model_input: ModelInput, cache: KVCache | None) -> list[int]:
    """What of each sample is in the cache, virtual tokens included."""
    num_samples = len(model_input.boundaries_) - 1
    if cache is None:
        return [0] * num_samples
    if len(cache.lengths_) != num_samples:
        raise ValueError(f"the batch has {num_samples} samples, but the cache holds {len(cache.lengths_)}")
    return list(cache.lengths_)
