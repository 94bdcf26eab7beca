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
    counts = dict.fromkeys(held_out, 0)
    # The bare base and single experts, which have no config of their own, insert nothing.
    inserted = {name: getattr(model.adapters_.get(name), "inserted_tokens", 0) for name in held_out}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for parts in _packed(held_out, max_batch_tokens, inserted):
                for output in model(fuse(parts, torch.device("cpu"))):
                    sums[output.adapter_name] += output.loss.item() * output.num_supervised_tokens
                    counts[output.adapter_name] += output.num_supervised_tokens
    finally:
        model.train(was_training)
    return {name: (sums[name] / max(counts[name], 1), counts[name]) for name in held_out}


def _packed(
    held_out: Mapping[str, Sequence[Sample]], max_batch_tokens: int, inserted: Mapping[str, int]
) -> list[list[tuple[BatchConfig, list[Sample]]]]:
    """Samples in order, cut into batches of at most so many tokens; a sample that is longer stands alone.

    Args:
        inserted: virtual tokens before each of an adapter's samples.
    """
    batches: list[list[tuple[BatchConfig, list[Sample]]]] = [[]]
    room = max_batch_tokens
    for name, samples in held_out.items():
        for sample in samples:
            size = len(sample.input_ids) + inserted[name]
            if batches[-1] and size > room:
                batches.append([])
                room = max_batch_tokens
            if not batches[-1] or batches[-1][-1][0].adapter_name != name:
                batches[-1].append((BatchConfig(name, 0, 0), []))  # fuse fills the sample indices in
            batches[-1][-1][1].append(sample)
            room -= size
    return [batch for batch in batches if batch]
