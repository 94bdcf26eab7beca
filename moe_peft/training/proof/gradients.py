"""How far two gradients of one adapter are apart, tensor by tensor.

Letters: W tensors of the adapter, as its file names them; each expert's is one of its own.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moe_peft.model.llama import LlamaForCausalLM

# A tensor with next to no gradient is measured by the adapter's: its own would make much of nothing.
SMALLEST_SHARE = 1e-3
Gradients = Sequence[Tensor | None]  # one a parameter; None: no gradient reached it


class GradientMeter:
    """Measures gradients of one adapter.

    Args:
        model: that carries it.
        adapter: its name.
    """

    def __init__(self, model: LlamaForCausalLM, adapter: str) -> None:
        self._device = model.device
        tensors: dict[int, list[str]] = {}
        for key, weight, _ in model.named_adapter_weights(adapter):
            tensors.setdefault(id(weight), []).append(key)
        self._stacked = [len(keys) for keys in tensors.values()]
        self.names = [key for keys in tensors.values() for key in keys]

    def norm(self, gradients: Gradients) -> float:
        """2-norm of the whole gradient."""
        return float(self._norms(gradients).norm())

    def distance(self, gradients: Gradients, expected: Gradients) -> Tensor:
        """``||g - e|| / max(||e||, 1e-3 of the adapter's norm)`` of every tensor, ``[W]``; inf for NaN."""
        norms = self._norms(expected)
        scale = norms.clamp(min=SMALLEST_SHARE * float(norms.norm()))
        # One at a time: no second set of gradients is ever there.
        apart = self._norms(_minus(*pair) for pair in zip(gradients, expected, strict=True))
        return torch.where(apart == 0, 0.0, apart / scale).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _norms(self, gradients: Iterable[Tensor | None]) -> Tensor:
        """Of every tensor, float64 ``[W]`` on the CPU, fetched in one transfer."""
        norms = [
            torch.zeros(count, device=self._device)
            if gradient is None
            else torch.linalg.vector_norm(gradient.reshape(count, -1), dim=1)
            for gradient, count in zip(gradients, self._stacked, strict=True)
        ]
        return torch.cat(norms).cpu().double()


def _minus(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return left if right is None else right
    return left - right
