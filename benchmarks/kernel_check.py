"""Whether the ways to compute an operation agree: outputs and gradients, before anybody measures their speed."""

from collections.abc import Callable, Mapping, Sequence

import torch
from kernel_case import Case, Inputs, Tensors
from torch import Tensor

# The worst row's error against the naive way in a wider dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Rows of the cases are near 1; of a sum whose terms cancel, as a lone token's gradient of its query, rounding is left.
_FLOOR = 1e-2

# From the outputs' gradients (None: forward alone) to the outputs and the gradients of what is differentiated.
Way = Callable[[Tensors | None], tuple[Tensors, Tensors]]


def ways_of(case: Case, device: torch.device) -> dict[str, Way]:
    """Those that are measured on a device."""
    reference = case.reference
    ways = {"ours": differentiated(case.ours, case.inputs, case.differentiated)}
    if reference is not None:
        ways["reference"] = lambda upstream: torch.no_grad()(reference)(case.inputs, upstream)
    return {**ways, "naive": differentiated(case.naive, case.inputs, case.differentiated)}


def differentiated(function: Callable[[Inputs], Tensor | Tensors], inputs: Inputs, names: Sequence[str]) -> Way:
    """A function's outputs and, by autograd, its gradients."""
    inputs = {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}
    leaves = [inputs[name] for name in names]

    def way(upstream: Tensors | None) -> tuple[Tensors, Tensors]:
        with torch.set_grad_enabled(upstream is not None):
            results = function(inputs)
        outputs = [results] if isinstance(results, Tensor) else list(results)
        return outputs, torch.autograd.grad(outputs, leaves, upstream) if upstream is not None else []

    return way


def errors_of(case: Case, ways: Mapping[str, Way], upstream: Tensors) -> dict[str, dict[str, float]]:
    """Each way's errors of each output and gradient, against the naive way in a wider dtype."""
    inputs = {name: _widened(x) for name, x in case.inputs.items()}
    outputs, gradients = differentiated(case.naive, inputs, case.differentiated)([_widened(x) for x in upstream])
    truth = {f"output {i}": x for i, x in enumerate(outputs)}
    truth |= {f"gradient of {name}": x for name, x in zip(case.differentiated, gradients, strict=True)}
    errors = {}
    for label, way in ways.items():
        found = [x for part in way(upstream) for x in part]
        errors[label] = {name: worst_row(x, truth[name]) for name, x in zip(truth, found, strict=True)}
    return errors


def _widened(x: Tensor) -> Tensor:
    """The float32 adapters of a 16-bit case stay as they are: their products with it run in its own dtype."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.detach().float()
    return x.detach().double() if x.dtype == torch.float32 else x.detach()


def worst_row(actual: Tensor, truth: Tensor) -> float:
    """Largest norm of a row's error, over that row's norm or the root mean square of all rows' if that is larger."""
    if actual.shape != truth.shape:
        return float("inf")
    truth = truth.double().flatten(0, -2) if truth.dim() > 1 else truth.double()[:, None]
    norms = truth.norm(dim=1)
    scale = norms.clamp(min=max(norms.square().mean().sqrt().item(), _FLOOR))
    return float(f"{((actual.double().reshape(truth.shape) - truth).norm(dim=1) / scale).max().item():.2g}")


def complaint_about(errors: Mapping[str, Mapping[str, float]], tolerance: float) -> str:
    """What is wrong with ours or the reference; nothing if it is right."""
    bad = [
        f"{label}, {name}: error {error:g} above {tolerance:g}"
        for label in errors
        if label != "naive"
        for name, error in errors[label].items()
        if not error <= tolerance  # NaN is not
    ]
    return "; ".join(bad)
