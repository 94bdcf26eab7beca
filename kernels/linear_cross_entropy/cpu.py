"""Losses and gradients of rows of logits in compiled C++."""

from torch import Tensor

from ..compiled import CompiledFunction

_rows = CompiledFunction("cross_entropy_rows", "pppiii")


def cross_entropy_rows(logits: Tensor, targets: Tensor, nll: Tensor, with_gradient: bool) -> None:
    """Fill nll ``[c]``, float32, and put the gradient of the logits ``[c, V]`` in their place.

    Args:
        logits: contiguous.
        targets: LongTensor ``[c]``.
        nll: contiguous.
        with_gradient: else the logits stay.
    """
    _rows(logits.dtype, logits, targets.contiguous(), nll, *logits.shape, with_gradient)
