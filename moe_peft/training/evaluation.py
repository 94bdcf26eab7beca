"""Held-out loss of several adapters in shared forwards."""

from collections.abc import Mapping, Sequence

import torch

from moe_peft.data.dispatcher import fuse
from moe_peft.data.samples import Sample
from moe_peft.model.batch import BatchConfig
from moe_peft.model.llama import LlamaForCausalLM


def evaluate(
    model: LlamaForCausalLM, held_out: Mapping[str, Sequence[Sample]], max_batch_tokens: int
) -> dict[str, tuple[float, int]]:
    """Mean loss of every adapter on its own held-out samples.

    Args:
        model: with the adapters attached.
        held_out: adapter name to samples.
        max_batch_tokens: tokens of one forward.

    Returns:
        Adapter name to mean negative log-likelihood a supervised token, and the number of those tokens.
    """
    sums = dict.fromkeys(held_out, 0.0)
    counts = {name: sum(sample.num_supervised_tokens for sample in samples) for name, samples in held_out.items()}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for parts in _packed(held_out, max_batch_tokens):
                for output in model(fuse(parts, torch.device("cpu"))):
                    sums[output.adapter_name] += output.loss.item() * output.num_supervised_tokens
    finally:
        model.train(was_training)
    return {name: (sums[name] / max(counts[name], 1), counts[name]) for name in held_out}


def _packed(
    held_out: Mapping[str, Sequence[Sample]], max_batch_tokens: int
) -> list[list[tuple[BatchConfig, list[Sample]]]]:
    """Samples in order, cut into batches of at most so many tokens; a sample that is longer stands alone."""
    batches: list[list[tuple[BatchConfig, list[Sample]]]] = [[]]
    room = max_batch_tokens
    for name, samples in held_out.items():
        for sample in samples:
            if batches[-1] and len(sample.input_ids) > room:
                batches.append([])
                room = max_batch_tokens
            if not batches[-1] or batches[-1][-1][0].adapter_name != name:
                batches[-1].append((BatchConfig(name, 0, 0), []))  # fuse fills the sample indices in
            batches[-1][-1][1].append(sample)
            room -= len(sample.input_ids)
    return [batch for batch in batches if batch]
