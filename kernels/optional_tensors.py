"""Lists with gaps for torch.library, which differentiates no list that holds a None."""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor


def without_gaps(items: Iterable[Tensor | None]) -> tuple[list[Tensor], list[bool]]:
    """The tensors, and at which places they stand."""
    items = list(items)
    return [item for item in items if item is not None], [item is not None for item in items]


def with_gaps(tensors: Iterable[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    """The list that ``without_gaps`` was given."""
    rest: Iterator[Tensor] = iter(tensors)
    return [next(rest) if here else None for here in present]
