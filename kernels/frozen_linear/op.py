"""Autograd for a frozen linear layer."""

from torch import Tensor

from ..products import linear, matmul
from ..registration import Differentiable, Operator

_frozen_linear = Differentiable(
    Operator(
        "frozen_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        linear,
        fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    ),
    Operator(
        "frozen_linear_backward(Tensor dy, Tensor weight) -> Tensor",
        matmul,
        fake=lambda dy, weight: dy.new_empty(dy.shape[0], weight.shape[1]),
    ),
    num_differentiated=1,
    save=lambda arguments, results: [arguments[1]],
    differentiate=lambda backward, kept, needs, grads: [backward(*grads, *kept)],
)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of which the backward keeps nothing but the weight.

    Args:
        x: ``[T, I]``.
        weight: frozen ``[O, I]``; no gradient is computed for it.
        bias: frozen ``[O]`` or None.

    Returns:
        ``[T, O]``.
    """
    result: Tensor = _frozen_linear(x, weight, bias)
    return result
