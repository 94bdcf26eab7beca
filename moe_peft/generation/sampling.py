"""How the next token is picked from the logits.

Letters: N rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_peft import strict
from moe_peft.model.draws import generator_for


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request picks its tokens; greedy unless a temperature is given.

    Args:
        temperature: divides the logits; 0 takes the most probable token always (greedy).
        top_k: only the k most probable tokens may be picked; 0: all.
        top_p: only the fewest most probable tokens whose probabilities reach p may be picked; 1: all
            (https://arxiv.org/abs/1904.09751). Counted after top_k.
        seed: a draw is a function of the seed and the token's position in its own sequence, and of nothing else.

    Raises:
        ValueError: on a value outside its rule.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        strict.check_fields(self)
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} must be at least 0, where 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0, where 0 is the whole vocabulary")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, where 1 is the whole vocabulary")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


def pick_tokens(logits: Tensor, samplings: Sequence[Sampling], draw_keys: Sequence[object]) -> list[int]:
    """The next token of every row.

    Args:
        logits: ``[N, V]``.
        samplings: one a row.
        draw_keys: what sets a row's draw apart from every other of the same seed: its request, and the position in it.

    Returns:
        N token ids. A row's depends on its own logits, sampling and draw key alone.
    """
    picked = logits.argmax(dim=-1)  # [N]
    drawn = [row for row, sampling in enumerate(samplings) if not sampling.is_greedy]
    if drawn:
        probabilities, ids = filtered_probabilities(logits[drawn], [samplings[row] for row in drawn])
        cumulated = probabilities.cumsum(dim=-1)
        draws = [
            torch.rand((), dtype=torch.float64, generator=generator_for(samplings[row].seed, "sample", draw_keys[row]))
            for row in drawn
        ]
        target = torch.stack(draws)[:, None].to(cumulated) * cumulated[:, -1:]
        rank = torch.searchsorted(cumulated, target, right=True)  # [rows drawn, 1]
        # A draw may round up to the whole sum, behind the last token that may be picked.
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        picked[drawn] = ids.gather(1, rank.minimum(last).clamp(min=0)).squeeze(1)
    tokens: list[int] = picked.tolist()
    return tokens


def filtered_probabilities(logits: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """What each row may pick, and how probable it is.

    Args:
        logits: ``[N, V]``.
        samplings: one a row, none greedy.

    Returns:
        Probabilities ``[N, V]``, largest first, zero where a filter forbids the token (not divided by what is left),
        and the token ids they belong to, ``[N, V]``. Of equally probable tokens the one with the lower id stands first.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=wide.dtype, device=wide.device)[:, None]

    ordered, ids = wide.sort(dim=-1, descending=True, stable=True)
    # Below the largest logit, so that a tiny temperature leaves 0 and -inf, and no inf - inf; nor 0 / 0.
    temperature = column([sampling.temperature for sampling in samplings]).clamp(min=torch.finfo(wide.dtype).tiny)
    ordered = (ordered - ordered[:, :1]) / temperature
    top_k = column([sampling.top_k or math.inf for sampling in samplings])
    ordered = ordered.masked_fill(torch.arange(ordered.shape[1], device=wide.device) >= top_k, -math.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of the more probable tokens
    # Rounding may bring the sum to 1 early: where nothing is to be cut, nothing is.
    top_p = column([sampling.top_p if sampling.top_p < 1 else math.inf for sampling in samplings])
    return probabilities.masked_fill(before >= top_p, 0), ids
