"""While answers are generated no weight changes: what depends on weights alone need not be computed at every token."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

_scope: ContextVar[object | None] = ContextVar("fixed_weights", default=None)


@contextlib.contextmanager
def fixed_weights() -> Iterator[None]:
    """Within it, and in this thread, the weights of the adapters that run stay as they are."""
    token = _scope.set(object())
    try:
        yield
    finally:
        _scope.reset(token)


class OfFixedWeights:
    """A value that is computed each time it is asked for, but once within ``fixed_weights``."""

    def __init__(self) -> None:
        self._kept: tuple[object, Any] | None = None

    def get(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, or gave since the weights are fixed."""
        scope, kept = _scope.get(), self._kept  # read once: another thread may be within a scope of its own
        if scope is None:
            return compute()
        if kept is None or kept[0] is not scope:
            self._kept = kept = (scope, compute())
        return kept[1]
