"""Arithmetic between adapters of one base: several low-rank updates become one LoRA adapter.

As PEFT's ``add_weighted_adapter`` (``peft/tuners/lora/model.py``, ``peft/utils/merge_utils.py``).

Letters: I input features, O output features, R rank of the result, N adapters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_peft import strict
from moe_peft.adapters.lora import PROJECTIONS, LoraConfig, target_linears
from moe_peft.model.draws import checked_seed, generator_for
from moe_peft.model.linear import Linear
from moe_peft.model.merging import adapted_linears, place_outside_of_projections

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

SIGN_METHODS = ("total", "frequency")
_SVD = "_svd"


@dataclass(frozen=True)
class _Rule:
    """What is done to each adapter's values before they are summed.

    Args:
        keeps: which of them stay: ``all``, the ``largest``, or ``random`` ones, scaled up by what is lost.
        elects: whether values against the majority's sign are left out (https://arxiv.org/abs/2306.01708).
    """

    keeps: str = "all"
    elects: bool = False


_RULES = {
    "linear": _Rule(),
    "ties": _Rule(keeps="largest", elects=True),
    "dare_linear": _Rule(keeps="random"),
    "dare_ties": _Rule(keeps="random", elects=True),
    "magnitude_prune": _Rule(keeps="largest"),
}
COMBINATION_TYPES = ("cat", "svd", *_RULES, *(f"{name}{_SVD}" for name in _RULES if name != "linear"))


@dataclass(frozen=True)
class _Update:
    """What one adapter adds to one projection: ``weight * scaling * B A``.

    Args:
        source: the adapter's name.
        lora_a: ``[r, I]``.
        lora_b: ``[O, r]``.
        weight: given to its adapter.
        scaling: the adapter's own.
    """

    source: str
    lora_a: Tensor
    lora_b: Tensor
    weight: float
    scaling: float

    @property
    def factor(self) -> float:
        """What the product is multiplied with in all."""
        return self.weight * self.scaling

    @property
    def max_rank(self) -> int:
        """Of any change of this projection."""
        return min(self.lora_a.shape[1], self.lora_b.shape[0])


def combine_adapters(
    model: "LlamaForCausalLM",
    names: Sequence[str],
    weights: Sequence[float],
    name: str,
    *,
    combination_type: str = "svd",
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    seed: int = 0,
) -> None:
    """Attach a new LoRA adapter that is a weighted combination of others on the same model.

    ``cat`` is the weighted sum itself, at the sum of the ranks; ``svd`` the nearest to it of rank ``svd_rank``. The
    others combine A and B each for itself (``linear``, ``ties``, ``dare_ties``, …), which is cheap and rough, or with
    ``_svd`` behind their name the whole updates, which are then cut to ``svd_rank``.

    Args:
        model: carries the adapters.
        names: those combined. Any method may take part whose adapters only add a low-rank product to projections.
        weights: one each; negative ones subtract.
        name: of the new adapter, a ``LoraConfig`` with scaling 1.
        combination_type: one of ``COMBINATION_TYPES``.
        density: share of the values that stay, in (0, 1]; for all types but ``linear``, ``cat`` and ``svd``.
        majority_sign_method: ``total`` (of the values) or ``frequency`` (of the signs); for the ``ties`` types.
        svd_rank: rank of the result, for the ``svd`` types, at most the largest projection's; None: the largest of the
            ranks combined.
        seed: of the values that the ``dare`` types drop, and of the new adapter's dropout.

    Raises:
        ValueError: on an unknown, unfit or merged adapter, a taken name, ranks that differ where A and B are combined
            for themselves, a setting outside its rule, or values that are not finite, before or behind. Nothing is
            attached then.
    """
    seed = checked_seed(seed)
    _check_names(names)
    weights = _checked_weights(weights, names)
    _check_settings(combination_type, density, majority_sign_method, svd_rank)
    for one in names:
        _check_adapter(model, one)
    found = _updates(model, names, weights)
    rank = _new_rank(found, names, combination_type, svd_rank)
    targets = tuple(name for name in PROJECTIONS if name in {projection for _, projection in found})
    if not targets:
        raise ValueError(f"names={list(names)}: none of these adapters changes a projection")
    rule = _RULES.get(combination_type.removesuffix(_SVD), _Rule())

    def mix(values: Sequence[Tensor], factors: Sequence[float], key: tuple[object, ...]) -> Tensor:
        return _mixed(values, factors, rule, density or 1.0, majority_sign_method, (seed, name, combination_type, *key))

    results: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for (layer_idx, projection), updates in found.items():
        check = partial(_check_finite, f"layer {layer_idx}'s {projection}", weights)
        if combination_type in ("cat", "svd"):
            pair = _concatenated(updates)
            if combination_type == "svd":
                pair = _truncated_product(*pair, rank, check)
        elif combination_type.endswith(_SVD):
            deltas = [update.scaling * update.lora_b @ update.lora_a for update in updates]
            key = (layer_idx, projection, *(update.source for update in updates))
            pair = _truncated(mix(deltas, [update.weight for update in updates], (*key, "delta")), rank, check)
        else:
            pair = _mixed_factors(updates, mix, layer_idx, projection)
        check(*pair)
        results[layer_idx, projection] = pair
    model.add_adapter(name, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), seed=seed)
    with torch.no_grad():
        for layer_idx, projection, linear in target_linears(model, targets):
            _fill(linear, name, results.get((layer_idx, projection)))


def _check_names(names: Sequence[str]) -> None:
    # A set has no order in which the weights could follow.
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence) or not names:
        raise ValueError(f"names={strict.show(names)} must be a list of at least one adapter")
    for i, one in enumerate(names):
        strict.coerce(one, str, f"names[{i}]")
    if len(set(names)) < len(names):
        raise ValueError(f"names={list(names)} has an adapter twice: add up its weights instead")


def _checked_weights(weights: Sequence[float], names: Sequence[str]) -> list[float]:
    if isinstance(weights, (str, bytes)) or not isinstance(weights, Sequence):
        raise ValueError(f"weights={strict.show(weights)} must be a list of numbers, one for each name")
    if len(weights) != len(names):
        raise ValueError(f"weights has {len(weights)} entries for {len(names)} names: give one each")
    return [strict.coerce(weight, float, f"weights[{i}]") for i, weight in enumerate(weights)]


def _check_settings(
    combination_type: str, density: float | None, majority_sign_method: str, svd_rank: int | None
) -> None:
    density = strict.coerce(density, float | None, "density")
    svd_rank = strict.coerce(svd_rank, int | None, "svd_rank")
    if combination_type not in COMBINATION_TYPES:
        close = strict.did_you_mean(combination_type, COMBINATION_TYPES)
        raise ValueError(f"combination_type={combination_type!r} must be one of {', '.join(COMBINATION_TYPES)}{close}")
    rule = _RULES.get(combination_type.removesuffix(_SVD), _Rule())
    if rule.keeps == "all" and density is not None:
        raise ValueError(f"density={density} has no meaning for combination_type={combination_type!r}: leave it out")
    if rule.keeps != "all" and not (density is not None and 0 < density <= 1):
        raise ValueError(f"density={density} must be in (0, 1] for combination_type={combination_type!r}")
    if majority_sign_method not in SIGN_METHODS:
        close = strict.did_you_mean(majority_sign_method, SIGN_METHODS)
        raise ValueError(
            f"majority_sign_method={majority_sign_method!r} must be one of {', '.join(SIGN_METHODS)}{close}"
        )
    if majority_sign_method != SIGN_METHODS[0] and not rule.elects:
        raise ValueError(
            f"majority_sign_method={majority_sign_method!r} has no meaning for combination_type={combination_type!r}"
        )
    if svd_rank is not None and not combination_type.endswith("svd"):
        raise ValueError(f"svd_rank={svd_rank} has no meaning for combination_type={combination_type!r}: leave it out")
    if svd_rank is not None and svd_rank < 1:
        raise ValueError(f"svd_rank={svd_rank} must be at least 1")


def _check_adapter(model: "LlamaForCausalLM", name: str) -> None:
    """Refuse an adapter that is more than low-rank products added to projections."""
    config = model.adapter_config(name)
    method = type(config).__name__
    outside = place_outside_of_projections(model, name)
    if outside is not None:
        raise ValueError(
            f"adapter {name!r} cannot be combined: {method} keeps something in {outside}, which is no LoRA"
        )
    for path, linear in adapted_linears(model, name):
        adapter = linear.loras_[name]
        if adapter.changes_input_ or adapter.changes_output_:
            raise ValueError(
                f"adapter {name!r} cannot be combined: what {method} does at {path} is more than a low-rank product"
            )


@torch.no_grad()
def _updates(
    model: "LlamaForCausalLM", names: Sequence[str], weights: Sequence[float]
) -> dict[tuple[int, str], list[_Update]]:
    """By layer and projection, what those of the adapters that sit there add."""
    found: dict[tuple[int, str], list[_Update]] = {}
    for layer_idx, projection, linear in target_linears(model, PROJECTIONS):
        for name, weight in zip(names, weights, strict=True):
            adapter = linear.loras_.get(name)
            pair = None if adapter is None else adapter.low_rank()
            if pair is not None:  # None, too, where all of an adapter's ranks are pruned
                lora_a, lora_b = (factor.detach() for factor in pair)
                if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
                    raise ValueError(
                        f"adapter {name!r} cannot be combined: its weights at layer {layer_idx}'s {projection} are not "
                        "finite"
                    )
                update = _Update(name, lora_a, lora_b, weight, adapter.scaling_)
                found.setdefault((layer_idx, projection), []).append(update)
    return found


def _new_rank(
    found: dict[tuple[int, str], list[_Update]], names: Sequence[str], combination_type: str, svd_rank: int | None
) -> int:
    ranks = dict.fromkeys(names, 0)  # the largest of each
    for updates in found.values():
        for update in updates:
            ranks[update.source] = max(ranks[update.source], update.lora_a.shape[0])
    if combination_type == "cat":
        return sum(ranks.values())
    if combination_type.endswith("svd"):
        most = max((update.max_rank for updates in found.values() for update in updates), default=0)
        if svd_rank is not None and svd_rank > most:
            raise ValueError(f"svd_rank={svd_rank} must be at most {most}: no change of these projections has more")
        return svd_rank or max(ranks.values())
    for updates in found.values():
        if len({update.lora_a.shape[0] for update in updates}) > 1:
            raise ValueError(
                f"combination_type={combination_type!r} needs adapters of one rank, but theirs are "
                f"{', '.join(f'{name}: {rank}' for name, rank in ranks.items())}: use cat, svd or a type with _svd"
            )
    return max(ranks.values())


def _check_finite(place: str, weights: Sequence[float], *values: Tensor) -> None:
    if not all(value.isfinite().all() for value in values):
        raise ValueError(
            f"weights={strict.show(list(weights))} are too large for {values[0].dtype}: values at {place} would not be "
            "finite"
        )


def _concatenated(updates: Sequence[_Update]) -> tuple[Tensor, Tensor]:
    """Factors whose product is the weighted sum, exactly."""
    lora_a = torch.cat([update.lora_a * update.factor for update in updates])
    return lora_a, torch.cat([update.lora_b for update in updates], dim=1)


def _mixed_factors(
    updates: Sequence[_Update],
    mix: Callable[[Sequence[Tensor], Sequence[float], tuple[object, ...]], Tensor],
    layer_idx: int,
    projection: str,
) -> tuple[Tensor, Tensor]:
    """A and B each mixed for itself, with the root of its update's factor; the sign goes to A."""
    roots = [math.sqrt(abs(update.factor)) for update in updates]
    signed = [math.copysign(root, update.factor) for root, update in zip(roots, updates, strict=True)]
    key = (layer_idx, projection, *(update.source for update in updates))
    lora_a = mix([update.lora_a for update in updates], signed, (*key, "lora_A"))
    return lora_a, mix([update.lora_b for update in updates], roots, (*key, "lora_B"))


def _mixed(
    values: Sequence[Tensor],
    factors: Sequence[float],
    rule: _Rule,
    density: float,
    majority_sign_method: str,
    key: tuple[object, ...],
) -> Tensor:
    """The weighted sum of tensors of one shape, thinned out by the rule; with elected signs, a mean of those kept."""
    if rule.keeps == "largest":
        values = [_largest(value, density) for value in values]
    elif rule.keeps == "random":
        masks = [kept_at_random(value, density, (*key, i)) for i, value in enumerate(values)]
        values = [value * mask / density for value, mask in zip(values, masks, strict=True)]
    stack = torch.stack(list(values))  # [N, ...]
    weighted = stack * torch.tensor(factors, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.dim() - 1))
    if not rule.elects:
        return weighted.sum(dim=0)
    ballot = stack if majority_sign_method == "total" else stack.sign()
    elected = torch.where(ballot.sum(dim=0) >= 0, 1, -1)
    agrees = stack.sign() == elected
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def _largest(values: Tensor, density: float) -> Tensor:
    """The values of the largest magnitude, zeros for the others."""
    flat = values.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(values)


def kept_at_random(values: Tensor, density: float, key: tuple[object, ...]) -> Tensor:
    """Ones where a value stays, zeros where it is dropped (https://arxiv.org/abs/2311.03099): a function of the key."""
    draws = torch.rand(values.shape, generator=generator_for(*key), dtype=torch.float64)
    return (draws < density).to(values)


def _truncated_product(
    lora_a: Tensor, lora_b: Tensor, rank: int, check: Callable[[Tensor], None]
) -> tuple[Tensor, Tensor]:
    """The nearest product of a smaller rank, without the ``[O, I]`` product itself."""
    q_a, r_a = torch.linalg.qr(lora_a.T)
    q_b, r_b = torch.linalg.qr(lora_b)
    small_a, small_b = _truncated(r_b @ r_a.T, rank, check)
    return small_a @ q_a.T, q_b @ small_b


def _truncated(delta: Tensor, rank: int, check: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
    """The nearest factors of a rank (Eckart and Young), with the singular values on B's side."""
    check(delta)  # of what is not finite there is no decomposition
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank]


def _fill(linear: Linear, name: str, pair: tuple[Tensor, Tensor] | None) -> None:
    """Put factors into a fresh LoRA of at least their rank; what is left over adds nothing."""
    lora = linear.loras_[name]
    lora.lora_A.zero_()
    lora.lora_B.zero_()
    if pair is not None:
        lora.lora_A[: pair[0].shape[0]] = pair[0]
        lora.lora_B[:, : pair[1].shape[1]] = pair[1]
