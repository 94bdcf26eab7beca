"""A dictionary that cannot change, and so can stand in a frozen config."""

from typing import Any, NoReturn, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class FrozenDict(dict[K, V]):
    """A ``dict`` that refuses changes and is hashable, as a frozen dataclass's fields must be.

    It equals a plain dictionary of the same items, and is written to JSON as one.
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        # As dict's it would be filled item by item.
        return type(self), (dict(self),)

    def _refuse(self, *arguments: Any, **named: Any) -> NoReturn:
        raise TypeError("a FrozenDict cannot be changed: make a new one")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse
