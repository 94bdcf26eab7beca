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
    if targets.numel():
        lowest, highest = targets.aminmax()
        if lowest < 0 or highest >= logits.shape[1]:
            raise IndexError(f"targets {int(lowest)}..{int(highest)} must be in 0..V-1={logits.shape[1] - 1}")
    _rows(logits.dtype, logits, targets.contiguous(), nll, *logits.shape, with_gradient)
