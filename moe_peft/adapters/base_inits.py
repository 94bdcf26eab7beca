"""LoRA factors that start from the frozen weight itself: PiSSA and OLoRA.

Letters: I input features, O output features, R rank.
"""

import math
import re

import torch
from torch import Tensor

from moe_peft.model.linear import Lora, wide_dtype

PISSA, OLORA = "pissa", "olora"
_PISSA_NITER = re.compile(r"pissa_niter_(\d+)")
MOST_ITERATIONS = 1000


def is_base_init(init: object) -> bool:
    """Whether a value of ``init_lora_weights`` starts from the frozen weight."""
    return init in (PISSA, OLORA) or num_iterations(init) is not None


def num_iterations(init: object) -> int | None:
    """N of ``pissa_niter_N``; None for any other value."""
    found = _PISSA_NITER.fullmatch(init) if isinstance(init, str) else None
    return None if found is None or int(found[1]) > MOST_ITERATIONS else int(found[1])


@torch.no_grad()
def factors_of_base(
    weight: Tensor, r: int, scaling: float, init: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The first A ``[R, I]`` and B ``[O, R]``, computed in at least float32.

    PiSSA takes the R largest singular values, ``s B A = U_R S_R V_R^T`` (https://arxiv.org/abs/2404.02948); OLoRA the
    first R columns and rows of ``W = Q R`` (https://arxiv.org/abs/2406.01775).

    Args:
        weight: the frozen one, ``[O, I]``.
        r: R, at most the smaller of O and I.
        scaling: s.
        init: ``pissa``, ``pissa_niter_N`` (an approximation by N rounds of subspace iteration) or ``olora``.
        generator: of the approximation's first guess.
    """
    wide = weight.to(wide_dtype(weight.dtype))
    if weight.is_meta:  # where sizes alone count; decompositions would import torch's compiler
        return wide.new_empty(r, weight.shape[1]), wide.new_empty(weight.shape[0], r)
    if init == OLORA:
        q = torch.linalg.qr(wide[:, :r]).Q  # the first columns of Q are made from W's own first columns alone
        return (q.T @ wide).contiguous(), q.contiguous()
    rounds = num_iterations(init)
    if rounds is None:
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    else:
        u, s, vh = _approximate_svd(wide, r, rounds, generator)
    roots = (s[:r] / scaling).sqrt()
    # LAPACK's results lie by columns, and fused optimizers take weights by rows.
    return (roots[:, None] * vh[:r]).contiguous(), (u[:, :r] * roots).contiguous()


def _approximate_svd(weight: Tensor, r: int, rounds: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 5.1 over 4.4 of https://arxiv.org/abs/0909.4061, as ``torch.svd_lowrank`` but for its draws."""
    if weight.shape[0] < weight.shape[1]:
        u, s, vh = _approximate_svd(weight.T, r, rounds, generator)
        return vh.T, s, u.T
    guess = torch.randn(weight.shape[1], r, generator=generator, dtype=weight.dtype).to(weight.device)
    q = torch.linalg.qr(weight @ guess).Q
    for _ in range(rounds):
        q = torch.linalg.qr(weight.T @ q).Q
        q = torch.linalg.qr(weight @ q).Q
    u, s, vh = torch.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, vh


class ShiftedLora(Lora):
    """A pair that counts from where it started: ``delta = scaling * (lora_B lora_A - initial_B initial_A)``.

    PEFT subtracts the product of the first factors from the frozen weight. Here that weight is shared by all adapters,
    so the pair itself brings the difference, as one of twice the rank.

    Args:
        lora_A: ``[R, I]``.
        lora_B: ``[O, R]``.
        is_shifted: False: it started from nothing, and is a ``Lora`` like any other.
    """

    initial_a_: Tensor | None
    initial_b_: Tensor | None

    def __init__(
        self, lora_A: Tensor, lora_B: Tensor, *, scaling: float, dropout: float, seed: int, is_shifted: bool = True
    ) -> None:
        super().__init__(lora_A, lora_B, scaling=scaling, dropout=dropout, seed=seed)
        self.register_buffer("initial_a_", lora_A.clone() if is_shifted else None)
        self.register_buffer("initial_b_", lora_B.clone() if is_shifted else None)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """``[A; A0]`` and ``[B, -B0]``."""
        if self.initial_a_ is None or self.initial_b_ is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.initial_a_]), torch.cat([self.lora_B, -self.initial_b_], dim=1)


def alpha_at_rank(scaling: float, r: int) -> float:
    """The ``lora_alpha`` with which ``use_rslora`` gives a scale at a rank: to the bit, where any float does."""
    root = math.sqrt(r)
    alpha = scaling * root
    return min(
        (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0.0)),
        key=lambda near: abs(near / root - scaling),
    )
