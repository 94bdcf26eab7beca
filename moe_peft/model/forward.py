"""What every layer of one forward needs to know about the fused batch."""

from dataclasses import dataclass, field

from torch import Tensor

from moe_peft.model.batch import Segment
from moe_peft.model.cache import KVCache
from moe_peft.model.draws import dropout_mask


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
    """

    segments: tuple[Segment, ...]
    boundaries: tuple[int, ...]
    cos: Tensor
    sin: Tensor
    training: bool
    cache: KVCache | None = None
    _masks: dict[tuple[int, int, str], Tensor] = field(default_factory=dict, repr=False)

    def draw_key(self, segment: Segment, seed: int, *site: object) -> tuple[object, ...]:
        """The key of a random draw: nothing outside the adapter and its own progress enters it."""
        return (int(seed), segment.task, int(segment.step), int(segment.micro_batch), *site)

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
        site = (segment.start, layer_idx, input_name)
        if site not in self._masks:
            shape = (segment.end - segment.start, x.shape[1])
            key = self.draw_key(segment, seed, "dropout", layer_idx, input_name)
            self._masks[site] = dropout_mask(shape, p, like=x, key=key)
        return self._masks[site]
