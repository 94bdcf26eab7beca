"""Operations with a backward of their own, declared once for eager mode and for compilers.

What torch.library does around a call costs a small model a few percent of its training step. So an operation is an
autograd function in eager mode, which calls the implementations themselves, and an operator that a compiler does not
look into while one is tracing: on both ways the same implementations, saved tensors and gradients.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_kernel(x: Tensor) -> bool:
    """Whether a Triton kernel takes this tensor's operation.

    Kernels accumulate in float32, which would waste float64; and not every platform with a GPU has Triton.
    """
    return x.is_cuda and x.dtype != torch.float64 and _has_triton()


_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])


def on_its_device(launcher: _Launcher) -> _Launcher:
    """A launcher of kernels that runs them on the GPU of its first tensor, which need not be the current one."""

    @functools.wraps(launcher)
    def guarded(first: Any, *arguments: Any, **settings: Any) -> Any:
        tensor = first[0] if isinstance(first, (list, tuple)) else getattr(first, "p1", first)
        with torch.cuda.device_of(tensor):
            return launcher(first, *arguments, **settings)

    return guarded  # type: ignore[return-value]


class Operator:
    """A function of tensors, and the operator ``moe_peft::<name>`` as which compilers see it.

    Args:
        schema: name, arguments and results as torch.library writes them: ``swiglu(Tensor gate, Tensor up) -> Tensor``.
            No list of tensors may hold a None.
        run: the function, called with the arguments in the schema's order. Its results are memory of their own.
        fake: results of the same shapes and dtypes for the same arguments, of which it reads no element.
    """

    def __init__(self, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
        name, bracket, signature = schema.partition("(")
        self.run = run
        self.opaque = torch.library.custom_op(f"moe_peft::{name}", run, mutates_args=(), schema=bracket + signature)
        self.opaque.register_fake(fake)


class Differentiable:
    """A forward operator with the backward operator that differentiates it.

    Args:
        forward: its first arguments are those that are differentiated, each a tensor or a list of tensors.
        backward: what ``differentiate`` calls.
        num_differentiated: how many arguments are differentiated; the others get no gradient.
        save: from the forward's arguments and its results to what the backward needs: tensors, lists of tensors, and
            values that hold no tensors.
        differentiate: from the backward to call, what ``save`` returned, which differentiated arguments need a gradient
            (a list does when one of its tensors does), and the gradient of every result (None where nothing reached
            it; never of all) to the gradient of every differentiated argument.
        constants: results through which nothing is differentiated, by their place.
        run: the forward as a function of other arguments, which no schema can say.
        flatten: makes the schema's arguments of those of ``run``.
    """

    def __init__(
        self,
        forward: Operator,
        backward: Operator,
        *,
        num_differentiated: int,
        save: Callable[[Sequence[Any], Sequence[Tensor]], Sequence[Any]],
        differentiate: Callable[[Callable[..., Any], Sequence[Any], Sequence[bool], Gradients], Sequence[Any]],
        constants: Sequence[int] = (),
        run: Callable[..., Any] | None = None,
        flatten: Callable[..., Sequence[Any]] | None = None,
    ) -> None:
        self.forward, self.backward = forward, backward
        self.num_differentiated = num_differentiated
        self.run = run or forward.run
        self._save, self._differentiate, self._constants, self._flatten = save, differentiate, constants, flatten
        forward.opaque.register_autograd(self._differentiate_opaque, setup_context=self.set_up)

    def __call__(self, *arguments: Any) -> Any:
        """What the forward returns, a sequence if it is more than one tensor."""
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with _own_dtypes():
                return self(*arguments)
        if torch.compiler.is_compiling():
            return self.forward.opaque(*self._flattened(arguments))
        if torch.is_grad_enabled():
            flat = self._flattened(arguments)
            tensors = _flat(flat[: self.num_differentiated])
            if any(tensor.requires_grad for tensor in tensors):
                return _Eager.apply(self, arguments, flat, *tensors)
        with torch.no_grad():  # an argument that is not differentiated may require a gradient all the same
            return self.run(*arguments)

    def _flattened(self, arguments: Sequence[Any]) -> Sequence[Any]:
        return arguments if self._flatten is None else self._flatten(*arguments)

    def set_up(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        """Keep for backward what it needs."""
        results = [output] if isinstance(output, Tensor) else output
        tensors: list[Tensor] = []
        ctx.kept = [_stored(item, tensors) for item in self._save(inputs, results)]
        ctx.lengths = [len(item) if _is_tensor_list(item) else None for item in inputs]
        ctx.set_materialize_grads(False)
        if self._constants:
            ctx.mark_non_differentiable(*(results[i] for i in self._constants))
        ctx.save_for_backward(*tensors)

    def gradients(self, ctx: Any, backward: Callable[..., Any], needs: Sequence[bool], grads: Gradients) -> list[Any]:
        """Of every differentiated argument."""
        if all(grad is None for grad in grads):
            return [None if length is None else [None] * length for length in ctx.lengths[: self.num_differentiated]]
        saved = iter(ctx.saved_tensors)
        kept = [item.restored(saved) if isinstance(item, _Stored) else item for item in ctx.kept]
        return list(self._differentiate(backward, kept, needs, grads))

    def _differentiate_opaque(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        needs = [any(need) if isinstance(need, list) else need for need in ctx.needs_input_grad]
        found = self.gradients(ctx, self.backward.opaque, needs[: self.num_differentiated], _flat(grads))
        others = ctx.lengths[self.num_differentiated :]
        return *found, *(None if length is None else [None] * length for length in others)


@contextmanager
def _own_dtypes() -> Iterator[None]:
    """Without autocast, which would give an operation's inner products another dtype than it has room for."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        yield
        return
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


class _Eager(torch.autograd.Function):
    """Any differentiable operation; autograd sees the tensors one by one, the operation its own arguments."""

    @staticmethod
    def forward(
        ctx: Any, operation: Differentiable, arguments: Sequence[Any], flat: Sequence[Any], *tensors: Tensor
    ) -> Any:
        output = operation.run(*arguments)
        ctx.operation = operation
        operation.set_up(ctx, flat, output)
        return output if isinstance(output, Tensor) else tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        operation = ctx.operation
        flags = iter(ctx.needs_input_grad[3:])
        lengths = ctx.lengths[: operation.num_differentiated]
        needs = [next(flags) if length is None else any(list(islice(flags, length))) for length in lengths]
        # Whoever differentiates the gradients themselves hears from torch.library whether that is possible.
        backward = operation.backward.opaque if torch.is_grad_enabled() else operation.backward.run
        with _own_dtypes():
            return None, None, None, *_flat(operation.gradients(ctx, backward, needs, grads))


@dataclass(frozen=True)
class _Stored:
    """The place of a saved tensor (no length) or of a list of them."""

    length: int | None

    def restored(self, saved: Iterator[Tensor]) -> Tensor | list[Tensor]:
        return next(saved) if self.length is None else list(islice(saved, self.length))


_ALONE = _Stored(None)


def _stored(item: Any, tensors: list[Tensor]) -> Any:
    """The place of tensors, which go to the list, or the item itself."""
    if isinstance(item, Tensor):
        tensors.append(item)
        return _ALONE
    if _is_tensor_list(item):
        tensors += item
        return _Stored(len(item))
    return item


def _is_tensor_list(item: Any) -> bool:
    """Torch's autograd takes any empty list for one."""
    return isinstance(item, list) and (not item or isinstance(item[0], Tensor))


def _flat(items: Iterable[Any]) -> list[Any]:
    """Tensors and the tensors of lists, in order."""
    return [tensor for item in items for tensor in (item if isinstance(item, (list, tuple)) else (item,))]
