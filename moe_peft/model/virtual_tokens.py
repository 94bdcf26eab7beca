"""Virtual tokens: what an adapter puts before each of its samples, as embeddings or as keys and values.

Letters: V virtual tokens, T tokens, D model, N layers, H query heads, G key-value heads, d features per head.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_peft.model.attention import suffix_attention, varlen_attention
from moe_peft.model.batch import IGNORE_INDEX, ModelInput, Segment

if TYPE_CHECKING:
    from moe_peft.model.forward import ForwardBatch
    from moe_peft.model.linear import AdapterDict

KeysValues = tuple[Tensor, ...]  # one tensor a layer, [2, V, G, d]: keys, then values


class FreeVirtualTokens(nn.Module):
    """Virtual tokens that are parameters themselves, ``[V, ...]``."""

    def __init__(self, prompt_embeddings: Tensor) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(prompt_embeddings)

    @property
    def num_virtual_tokens(self) -> int:
        """V."""
        return self.prompt_embeddings.shape[0]

    def forward(self, segment: Segment | None = None, batch: "ForwardBatch | None" = None) -> Tensor:
        """The parameters. An encoder in this place asks segment and batch for its dropout; without them it has none."""
        return self.prompt_embeddings


@dataclass(frozen=True)
class AttentionRun:
    """Neighbouring samples whose attention is computed together: behind one adapter's prefix, or behind none.

    Args:
        first: its first sample.
        last: one past its last sample.
        boundaries: first key of every sample, the prefix included, counted from the run's start; then their number.
        prefix: the keys and values before each sample; None: there are none.
        cu_seqlens: the boundaries as an int32 tensor on a GPU, else None.
    """

    first: int
    last: int
    boundaries: tuple[int, ...]
    prefix: KeysValues | None = None
    cu_seqlens: Tensor | None = None

    @property
    def num_before(self) -> int:
        """V, or 0 without a prefix."""
        return 0 if self.prefix is None else self.prefix[0].shape[1]


def owners_of(model_input: ModelInput, segments: Sequence[Segment], adapters: "AdapterDict") -> list[Any]:
    """What each sample's adapter keeps among the adapters, or None, a sample each."""
    return [
        adapters.get(segment.task)
        for segment, config in zip(segments, model_input.batch_configs_, strict=True)
        for _ in range(config.batch_start_idx, config.batch_end_idx)
    ]


def num_before(owners: Sequence[Any], past: Sequence[int]) -> list[int]:
    """How many virtual tokens each sample gets: all of its adapter's at its beginning, none behind a filled cache."""
    return [
        owner.num_virtual_tokens if owner is not None and not seen else 0
        for owner, seen in zip(owners, past, strict=True)
    ]


def with_virtual_tokens(model_input: ModelInput, counts: Sequence[int]) -> ModelInput:
    """The batch with so many more tokens, of id 0 and without a label, before each sample."""
    if not any(counts):
        return model_input
    heads = [model_input.input_ids.new_zeros(count) for count in counts]
    edges = model_input.boundaries_
    lengths = [count + end - start for count, (start, end) in zip(counts, itertools.pairwise(edges), strict=True)]
    labels = model_input.labels
    if labels is not None:
        labels = put_before(labels, [torch.full_like(head, IGNORE_INDEX, dtype=labels.dtype) for head in heads], edges)
    return replace(
        model_input,
        input_ids=put_before(model_input.input_ids, heads, edges),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        labels=labels,
    )


def embedded_with(
    prompts: "AdapterDict", embedded: Tensor, counts: Sequence[int], edges: Sequence[int], batch: "ForwardBatch"
) -> Tensor:
    """Embedded tokens ``[T, D]`` with the embeddings of the virtual ones before each sample.

    Args:
        prompts: what makes those of an adapter, ``[V, D]`` each.
        embedded: the samples' own tokens.
        counts: of virtual tokens, a sample each.
        edges: first of a sample's own tokens, then T.
        batch: with the virtual tokens in it.
    """
    if not any(counts):
        return embedded
    heads: list[Tensor | None] = []
    for segment in batch.segments:
        first, last = (bisect.bisect_left(batch.boundaries, edge) for edge in (segment.start, segment.end))
        asking = counts[first:last]
        head = prompts[segment.task](segment, batch).to(embedded.dtype) if any(asking) else None
        heads += [head if count else None for count in asking]
    return put_before(embedded, heads, edges)


def put_before(x: Tensor, heads: Sequence[Tensor | None], edges: Sequence[int]) -> Tensor:
    """Rows ``[T, ...]`` with a head of its own, or none, before each sample's."""
    rows = x.split([end - start for start, end in itertools.pairwise(edges)])
    pieces = itertools.chain.from_iterable(zip(heads, rows, strict=True))
    return torch.cat([piece for piece in pieces if piece is not None])


def without_virtual_tokens(x: Tensor, counts: Sequence[int], edges: Sequence[int]) -> Tensor:
    """Rows ``[T, ...]`` without the first ``counts[i]`` of each sample."""
    if not any(counts):
        return x
    lengths = [end - start for start, end in itertools.pairwise(edges)]
    pieces = x.split([part for count, length in zip(counts, lengths, strict=True) for part in (count, length - count)])
    return torch.cat(pieces[1::2])


def prefix_runs(
    prefixes: "AdapterDict", segments: Sequence[Segment], boundaries: Sequence[int], shape: Sequence[int], like: Tensor
) -> tuple[AttentionRun, ...]:
    """The samples cut into runs by the prefixes that they stand behind; nothing where no sample has one.

    Args:
        prefixes: what makes those of an adapter, ``[V, N * 2 * G * d]`` each.
        segments: the adapters' token ranges.
        boundaries: first token of every sample, then T.
        shape: N, 2, G, d.
        like: a tensor of the keys' dtype and device.
    """
    if not any(segment.task in prefixes for segment in segments):
        return ()
    runs = []
    for has_prefix, group in itertools.groupby(segments, key=lambda segment: segment.task in prefixes):
        parts = list(group)
        for part in [[one] for one in parts] if has_prefix else [parts]:
            first, last = (bisect.bisect_left(boundaries, edge) for edge in (part[0].start, part[-1].end))
            prefix = keys_values(prefixes[part[0].task](), shape, like) if has_prefix else None
            more = prefix[0].shape[1] if prefix is not None else 0
            edges = tuple(edge - boundaries[first] + more * i for i, edge in enumerate(boundaries[first : last + 1]))
            on_gpu = like.device.type == "cuda"
            cu_seqlens = torch.tensor(edges, dtype=torch.int32).to(like.device, non_blocking=True) if on_gpu else None
            runs.append(AttentionRun(first, last, edges, prefix, cu_seqlens))
    return tuple(runs)


def keys_values(prefix: Tensor, shape: Sequence[int], like: Tensor) -> KeysValues:
    """A prefix ``[V, N * 2 * G * d]`` as keys and values of each layer."""
    by_layer = prefix.to(like.device, like.dtype).unflatten(1, tuple(shape))  # [V, N, 2, G, d]
    return by_layer.permute(1, 2, 0, 3, 4).unbind()


def attention_behind_prefixes(
    q: Tensor, k: Tensor, v: Tensor, batch: "ForwardBatch", asking: "ForwardBatch", window: int | None, layer_idx: int
) -> Tensor:
    """As ``varlen_attention``, or as ``suffix_attention`` of fewer queries, each run behind its prefix.

    Args:
        q: ``[T_asking, H, d]``.
        k: ``[T, G, d]``.
        v: ``[T, G, d]``.
        batch: of all tokens, with its runs.
        asking: of the tokens that query.
        window: tokens a token may attend to, itself and the prefix's included; None: all.
        layer_idx: the layer whose prefixes are to be taken.

    Returns:
        ``[T_asking, H, d]``.
    """
    own, asked = (_edges_by_run(part, batch.runs) for part in (batch, asking))
    mixed = []
    for run, edges, ends, queries, keys, values in zip(
        batch.runs, own, asked, _by_run(q, asked), _by_run(k, own), _by_run(v, own), strict=True
    ):
        num_samples = run.last - run.first
        if run.prefix is not None:
            heads = run.prefix[layer_idx].unbind()  # keys and values, [V, G, d]
            keys, values = (
                put_before(x, [head] * num_samples, edges) for x, head in zip((keys, values), heads, strict=True)
            )
        if asking is not batch:
            mixed.append(suffix_attention(queries, keys, values, ends, run.boundaries, window))
        elif run.prefix is None:
            mixed.append(varlen_attention(queries, keys, values, run.boundaries, window, run.cu_seqlens))
        else:
            # Queries of nothing in the prefix's places, whose answers are dropped, make it one call over all samples.
            blank = queries.new_zeros(run.num_before, *queries.shape[1:])
            rows = put_before(queries, [blank] * num_samples, edges)
            answers = varlen_attention(rows, keys, values, run.boundaries, window, run.cu_seqlens)
            mixed.append(without_virtual_tokens(answers, [run.num_before] * num_samples, run.boundaries))
    return torch.cat(mixed)


def _edges_by_run(batch: "ForwardBatch", runs: Sequence[AttentionRun]) -> list[tuple[int, ...]]:
    """First token of every sample of a run, then their number, counted from the run's start."""
    cut = [batch.boundaries[run.first : run.last + 1] for run in runs]
    return [tuple(edge - edges[0] for edge in edges) for edges in cut]


def _by_run(x: Tensor, edges: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    return x.split([own[-1] for own in edges])
