"""What a step cannot do without: the frozen projections' matrix products, and the step's count of FLOPs.

Letters: T tokens, N rows with a label, I input features, O output features, V vocabulary, D model, L layers, R rank.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from batches import Batch
from timing import seconds_of
from torch import Tensor

from moe_peft.adapters.lora import PROJECTIONS, target_linears
from moe_peft.kernels.products import matmul, matmul_t
from moe_peft.model.llama import LlamaForCausalLM

_HEAD_CHUNK = 2**26  # most logits at once

# Dense bf16 peaks of the data sheets, in FLOP/s, by a part of the device's name; the first match counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


class BaseGemms:
    """The necessary products with frozen weights, alone: ``x W^T`` and ``dy W`` of every projection at its real shape.

    The lowest projections' inputs need no gradient. Above the last layer's keys and values only rows with a label are
    needed, and of the head too.

    Args:
        model: whose weights.
        batches: product set i has the rows of ``batches[i % len(batches)]``.
    """

    def __init__(self, model: LlamaForCausalLM, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = batches
        num_rows = max(batch.num_tokens for batch in batches)
        linears = [linear for _, _, linear in target_linears(model, PROJECTIONS)]
        widths = {width for linear in linears for width in (linear.in_features, linear.out_features)}
        options: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        self._read = {width: torch.randn(num_rows, width, **options) for width in widths}
        vocab = model.config_.vocab_size
        self._chunk = min(num_rows, max(1, _HEAD_CHUNK // vocab))
        self._logits = torch.randn(self._chunk, vocab, **options)

    def __call__(self, number: int) -> float:
        """Run them once; returns the seconds."""
        batch = self._batches[number % len(self._batches)]
        return seconds_of(partial(self._run, batch.num_tokens, batch.num_supervised), self._model.device)

    @torch.no_grad()
    def _run(self, num_tokens: int, num_labelled: int) -> None:
        last = self._model.config_.num_hidden_layers - 1
        for layer, projection, linear in target_linears(self._model, PROJECTIONS):
            rows = num_labelled if layer == last and projection not in ("k_proj", "v_proj") else num_tokens
            needs_dx = layer > 0 or projection not in ("q_proj", "k_proj", "v_proj")
            self._products(linear.base_layer_.weight, rows, needs_dx)
        head = self._model.lm_head_.weight  # [V, D]
        hidden = self._model.config_.hidden_size
        for start in range(0, num_labelled, self._chunk):
            rows = min(self._chunk, num_labelled - start)
            matmul_t(self._read[hidden][:rows], head)
            matmul(self._logits[:rows], head)

    def _products(self, weight: Tensor, rows: int, needs_dx: bool) -> None:
        outputs, inputs = weight.shape  # [O, I]
        matmul_t(self._read[inputs][:rows], weight)
        if needs_dx:
            matmul(self._read[outputs][:rows], weight)


def step_flops(model: LlamaForCausalLM, batch: Batch, trainable_per_token: float) -> float:
    """FLOPs of a LoRA step on a frozen base: ``4 P T + 6 D L sum(length^2) + 6 P_adapter T``.

    Args:
        model: its projections are P; the head counts for rows with a label alone.
        batch: causal attention sees half of each sample's square, forward once and backward twice.
        trainable_per_token: adapter weights that a token meets.
    """
    projections = sum(linear.base_layer_.weight.numel() for _, _, linear in target_linears(model, PROJECTIONS))
    config = model.config_
    attention = config.num_attention_heads * config.head_size * config.num_hidden_layers
    return (
        4.0 * projections * batch.num_tokens
        + 4.0 * model.lm_head_.weight.numel() * batch.num_supervised
        + 6.0 * attention * sum(length**2 for length in batch.lengths)
        + 6.0 * trainable_per_token * batch.num_tokens
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's own limit for 16-bit products; None where it is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if all(word in name for word in part.split())), None)
