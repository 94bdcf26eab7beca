"""What every layer of one forward needs to know about the fused batch."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moe_peft import ops
from moe_peft.model.batch import Segment
from moe_peft.model.cache import KVCache
from moe_peft.model.draws import dropout_mask
from moe_peft.model.virtual_tokens import AttentionRun


@dataclass(frozen=True)
class Replay:
    """What a forward of one adapter's tokens takes over from an earlier forward of them: its draws and its routing.

    Args:
        tokens: LongTensor ``[T]``, where each token stood in the earlier forward.
        num_tokens: how many it had.
        router_logits: what its routers said of these tokens, ``[T, E]`` a routed layer; empty without routers.
        own_router_logits: filled by the forward: what the routers say this time, by layer.
    """

    tokens: Tensor
    num_tokens: int
    router_logits: tuple[Tensor, ...] = ()
    own_router_logits: dict[int, Tensor] = field(default_factory=dict)

    def routed(self, layer_idx: int, logits: Tensor, top_k: int) -> Tensor:
        """Note a router's logits and give back such as choose the earlier forward's experts.

        They are the logits themselves, but where the choice is another one: there they have the earlier values, and
        the gradient goes on to the new ones.
        """
        self.own_router_logits[layer_idx] = logits.detach()
        earlier = self.router_logits[layer_idx]
        is_flipped = (chosen_experts(logits, top_k) != chosen_experts(earlier, top_k)).any(dim=1, keepdim=True)
        return torch.where(is_flipped, earlier + (logits - logits.detach()), logits)


def chosen_experts(router_logits: Tensor, top_k: int) -> Tensor:
    """The experts with the k largest logits of ``[T, E]``, LongTensor ``[T, K]`` in ascending order."""
    return ops.route(router_logits.detach(), top_k)[1].sort(dim=1).values


_replay: ContextVar[Replay | None] = ContextVar("replay", default=None)


@contextmanager
def replaying(replay: Replay) -> Iterator[None]:
    """Forwards inside the ``with``, each of one adapter alone, take their draws and routing from an earlier one."""
    token = _replay.set(replay)
    try:
        yield
    finally:
        _replay.reset(token)


@dataclass(frozen=True)
class ForwardBatch:
    """Adapters' token ranges, samples' boundaries and rotary tables of one forward.

    Args:
        segments: the adapters' token ranges, in order, covering all tokens.
        boundaries: first token of every sample, then T.
        cos: ``[T, 1, d]``.
        sin: ``[T, 1, d]``.
        training: dropout and jitter are active.
        cache: keys and values of earlier tokens, when generating.
        cu_seqlens: the boundaries as an int32 tensor on a GPU, else None.
        recompute_around_attention: the layers keep attention alone for backward and compute the rest again.
        whole: the batch of which these tokens are a part; None: they are all.
        rows: LongTensor ``[T]``, where they stand in it.
        host_rows: the same on the CPU.
        replay: what is taken over from an earlier forward, if anything.
        runs: all samples by the prefixes that they stand behind; empty where there are none, or they are in the cache.
    """

    segments: tuple[Segment, ...]
    boundaries: tuple[int, ...]
    cos: Tensor
    sin: Tensor
    training: bool
    cache: KVCache | None = None
    cu_seqlens: Tensor | None = None
    recompute_around_attention: bool = False
    whole: "ForwardBatch | None" = None
    rows: Tensor | None = None
    host_rows: Tensor | None = None
    replay: Replay | None = field(default_factory=_replay.get)
    runs: tuple[AttentionRun, ...] = ()
    _masks: dict[tuple[int, int, str], Tensor] = field(default_factory=dict, repr=False)

    def narrowed(self, firsts: Sequence[int], always: bool = False) -> "ForwardBatch":
        """The batch of the tokens from ``firsts[i]`` of sample i on; at least one of every sample.

        Nothing is dropped where all are zero: then it is this batch itself, unless a new one is ``always`` wanted.
        """
        if not any(firsts) and not always:
            return self
        starts = [edge + first for edge, first in zip(self.boundaries, firsts, strict=False)]
        kept = list(zip(starts, self.boundaries[1:], strict=True))
        host_rows = torch.cat([torch.arange(start, end) for start, end in kept])
        rows = host_rows.to(self.cos.device, non_blocking=True)
        edges = dict(
            zip(self.boundaries, itertools.accumulate((end - start for start, end in kept), initial=0), strict=True)
        )
        return replace(
            self,
            segments=tuple(replace(part, start=edges[part.start], end=edges[part.end]) for part in self.segments),
            boundaries=tuple(edges.values()),
            cos=self.cos.index_select(0, rows),
            sin=self.sin.index_select(0, rows),
            cu_seqlens=None,
            whole=self,
            rows=rows,
            host_rows=host_rows,
            _masks={},
        )

    def rows_within(self, segment: Segment) -> Tensor | None:
        """Where a segment's tokens stand in the same segment of the whole batch; None when they are all."""
        if self.whole is None or self.rows is None:
            return None
        return self.rows[segment.start : segment.end] - self._in_whole(segment).start

    def _in_whole(self, segment: Segment) -> Segment:
        assert self.whole is not None
        return self.whole.segments[self.segments.index(segment)]

    def draw_key(self, segment: Segment, seed: int, *site: object) -> tuple[object, ...]:
        """The key of a random draw: nothing outside the adapter and its own progress enters it."""
        return (int(seed), segment.task, int(segment.step), int(segment.micro_batch), *site)

    def drawn_rows(self, segment: Segment, draw: Callable[[int], Tensor]) -> Tensor:
        """Random numbers for a segment's tokens, a row each, from what ``draw`` gives for a number of rows."""
        if self.replay is None:
            return draw(segment.end - segment.start)
        return draw(self.replay.num_tokens).index_select(0, self.replay.tokens)

    def dropout_mask(
        self, segment: Segment, seed: int, p: float, layer_idx: int, input_name: str, x: Tensor
    ) -> Tensor | None:
        """The adapter's mask for one input of one layer, shared by everything that reads it.

        Args:
            x: the input over all tokens, ``[T, I]``.

        Returns:
            ``[segment tokens, I]`` in x's dtype; None when nothing is dropped.
        """
        if not self.training or p == 0.0:
            return None
        if self.whole is not None:  # a token's mask does not depend on which others are computed beside it
            mask = self.whole.dropout_mask(self._in_whole(segment), seed, p, layer_idx, input_name, x)
            return mask[self.rows_within(segment)] if mask is not None else None
        site = (layer_idx, segment.start, input_name)
        if site not in self._masks:
            for old in [other for other in self._masks if other[0] != layer_idx]:
                del self._masks[old]  # a layer that is left keeps its own masks as long as its backward needs them
            key = self.draw_key(segment, seed, "dropout", layer_idx, input_name)
            self._masks[site] = self.drawn_rows(
                segment, lambda rows: dropout_mask((rows, x.shape[1]), p, like=x, key=key)
            )
        return self._masks[site]
