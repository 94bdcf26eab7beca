"""Batch invariance: a token's results have the same bits whatever other adapters' tokens stand beside it.

A library chooses how to add up a product by the number of its rows, and neighbours of one length share batched
products. Both round a token's values in another way when its neighbours change. It costs time to do without.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class _Switch:
    """Whether results are batch-invariant."""

    is_on = False


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Within it, the whole process's frozen products take a fixed number of rows, and adapters share no other product.

    The same holds for a GPU's frozen products; a Triton kernel adds up a range of its own anyway.
    """
    before, _Switch.is_on = _Switch.is_on, True
    try:
        yield
    finally:
        _Switch.is_on = before


def is_batch_invariant() -> bool:
    """Whether :func:`batch_invariant` is in force."""
    return _Switch.is_on
