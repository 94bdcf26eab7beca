"""While answers are generated no weight changes: what depends on weights alone need not be computed at every token."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

_kept: ContextVar[dict[Any, Any] | None] = ContextVar("fixed_weights", default=None)


@contextlib.contextmanager
def fixed_weights() -> Iterator[None]:
    """Within it, and in this thread, the weights of the adapters that run stay as they are.

    However they change before or behind it, what is computed within it is of the weights that it finds. What was kept
    is freed at its end.
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def of_fixed_weights(compute: Callable[..., Any], *modules: torch.nn.Module) -> Any:
    """What ``compute(*modules)`` gives: each time it is asked for, but once within ``fixed_weights``.

    Where gradients are recorded it is computed, and all that was kept is freed: an optimizer's step may follow.

    Args:
        compute: a method of what it depends on, which it is known by.
        modules: what else it depends on.
    """
    kept = _kept.get()
    if kept is None:
        return compute(*modules)
    if torch.is_grad_enabled():
        kept.clear()
        return compute(*modules)
    key = compute, modules
    if key not in kept:
        kept[key] = compute(*modules)
    return kept[key]
