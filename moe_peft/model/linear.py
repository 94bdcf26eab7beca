"""The frozen linear layer that carries adapters, and the dictionary it keeps them in.

Letters: T tokens, I input features, O output features, R rank.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_peft import ops
from moe_peft.model.fixed_weights import of_fixed_weights

if TYPE_CHECKING:
    from moe_peft.model.batch import Segment
    from moe_peft.model.forward import ForwardBatch


class AdapterDict(nn.Module):
    """A registered dictionary of modules whose keys may hold dots, as in ``moe.qa.experts.0``.

    ``nn.ModuleDict`` refuses dots because they separate state-dict keys; here they are stored as ``/``. It also refuses
    names of its own methods, such as ``train``; here no name becomes an attribute. A change makes a new dictionary, so
    that a forward in another thread goes through the old one undisturbed.
    """

    def train(self, mode: bool = True) -> "AdapterDict":
        """As ``nn.Module.train``, which would mistake its attribute for an adapter named ``training``."""
        self.__dict__["training"] = mode
        for module in self.children():
            module.train(mode)
        return self

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self.__dict__["_modules"] = {**self._modules, name.replace(".", "/"): module}

    def __getitem__(self, name: str) -> Any:
        module = self.get(name)
        if module is None:
            raise KeyError(name)
        return module

    def __delitem__(self, name: str) -> None:
        key = name.replace(".", "/")
        if key not in self._modules:
            raise KeyError(name)
        self.__dict__["_modules"] = {other: module for other, module in self._modules.items() if other != key}

    def __contains__(self, name: str) -> bool:
        return name.replace(".", "/") in self._modules

    def __iter__(self) -> Iterator[str]:
        return (key.replace("/", ".") for key in self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def get(self, name: str) -> Any:
        """The module of that name, or None."""
        return self._modules.get(name.replace(".", "/"))

    def keys(self) -> Iterator[str]:
        """The names, dotted."""
        return iter(self)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Pairs of dotted name and module."""
        return ((name, self[name]) for name in self)


class LinearAdapter(nn.Module):
    """What an adapter keeps on one projection ``y = W x + b``: a low-rank pair, a change of its input or its output.

    Args:
        scaling: factor of the low-rank product.
        dropout: probability of zeroing a feature of the low-rank product's input during training.
        seed: of the adapter's draws.
    """

    changes_input_ = False  # whether ``before`` does anything
    changes_output_ = False  # whether ``behind`` does anything

    def __init__(self, *, scaling: float = 1.0, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.scaling_ = scaling
        self.dropout_ = dropout
        self.seed_ = seed

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """``lora_A [R, I]`` and ``lora_B [O, R]`` as they act now, in the adapters' dtype; None without any."""
        return None

    def before(self, x: Tensor) -> Tensor:
        """The adapter's rows ``[n, I]`` of the input as the projection is to see them."""
        return x

    def behind(self, y: Tensor, base_layer: nn.Linear) -> Tensor:
        """The adapter's rows ``[n, O]`` of what the projection, its bias and the low-rank product give, changed."""
        return y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The frozen weight ``[O, I]`` and bias ``[O]``, both in the adapters' dtype, with the adapter in them."""
        pair = self.low_rank()
        return (weight if pair is None else weight + self.scaling_ * (pair[1] @ pair[0])), bias


class Lora(LinearAdapter):
    """One low-rank factor pair: ``delta = scaling * lora_B lora_A``.

    Args:
        lora_A: ``[R, I]``.
        lora_B: ``[O, R]``.
        scaling: factor of the product.
        dropout: probability of zeroing a feature of the input during training.
        seed: of the adapter's draws.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, *, scaling: float, dropout: float, seed: int) -> None:
        super().__init__(scaling=scaling, dropout=dropout, seed=seed)
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """The factors themselves."""
        return self.lora_A, self.lora_B


class Linear(nn.Module):
    """A frozen linear layer that adds to each adapter's tokens what that adapter has learnt.

    Args:
        base_layer: the frozen ``nn.Linear``.
        layer_idx: the decoder layer it belongs to.
        input_name: what it reads (``attn_in``, ``attn_out``, ``mlp_in``, ``mlp_hidden``). Layers that read the same
            input share an adapter's dropout mask.
    """

    def __init__(self, base_layer: nn.Linear, *, layer_idx: int = 0, input_name: str = "x") -> None:
        super().__init__()
        self.base_layer_ = base_layer
        self.loras_ = AdapterDict()
        self.layer_idx_ = layer_idx
        self.input_name_ = input_name

    @property
    def in_features(self) -> int:
        """I."""
        return self.base_layer_.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.base_layer_.out_features

    def forward(self, x: Tensor, batch: "ForwardBatch") -> Tensor:
        """Base product over all tokens, each adapter's own product over its range.

        Args:
            x: ``[T, I]``.
            batch: token ranges of the adapters.

        Returns:
            ``[T, O]``.
        """
        (y,) = project(ops.Recomputable(x), (self,), batch)
        return y


def project(x: ops.Recomputable, layers: Sequence[Linear], batch: "ForwardBatch") -> list[Tensor]:
    """Several layers that read one input, which they read together.

    Args:
        x: ``[T, I]``.
        layers: of one ``input_name``.
        batch: token ranges of the adapters.

    Returns:
        ``[T, O]`` of each layer.
    """
    owners = [tuple(_adapter_on(layer, segment) for layer in layers) for segment in batch.segments]
    if any(one is not None and one.changes_input_ for own in owners for one in own):
        if len(layers) > 1:  # each of them may see another input
            return [project(x, (layer,), batch)[0] for layer in layers]
        befores = [None if one is None or not one.changes_input_ else one.before for (one,) in owners]
        x = ops.Recomputable(_by_segment(x.value, befores, batch))
    ranges = []
    for segment, own in zip(batch.segments, owners, strict=True):
        pairs = tuple(None if one is None else _pair_of(one) for one in own)
        first = next((one for one, pair in zip(own, pairs, strict=True) if one is not None and pair is not None), None)
        if first is None:
            continue
        mask = batch.dropout_mask(
            segment, first.seed_, first.dropout_, layers[0].layer_idx_, layers[0].input_name_, x.value
        )
        scalings = tuple(one.scaling_ if one is not None else 0.0 for one in own)
        ranges.append(ops.LoraRange(segment.start, segment.end, pairs, scalings, mask))
    base_layers = [layer.base_layer_ for layer in layers]
    outputs = ops.lora_linear(x, [base.weight for base in base_layers], [base.bias for base in base_layers], ranges)
    for i, base in enumerate(base_layers):
        behinds = [
            functools.partial(own[i].behind, base_layer=base) if own[i] is not None and own[i].changes_output_ else None
            for own in owners
        ]
        if any(behinds):
            outputs[i] = _by_segment(outputs[i], behinds, batch)
    return outputs


def _adapter_on(layer: Linear, segment: "Segment") -> Any:
    """What a segment's adapter keeps on a layer, a ``LinearAdapter``; None where it keeps nothing."""
    own = layer.loras_.get(segment.adapter_name)
    return layer.loras_.get(segment.task) if own is None else own


def _pair_of(adapter: LinearAdapter) -> tuple[Tensor, Tensor] | None:
    """Its ``low_rank()``; one that is computed is computed once while weights are fixed."""
    if type(adapter).low_rank is Lora.low_rank:
        return adapter.low_rank()
    pair: tuple[Tensor, Tensor] | None = of_fixed_weights(adapter.low_rank)
    return pair


def _by_segment(x: Tensor, functions: Sequence[Callable[[Tensor], Tensor] | None], batch: "ForwardBatch") -> Tensor:
    """``[T, ...]`` with a function of each segment's own on that segment's rows; None leaves them."""
    # Split, not sliced: the backward of each slice would fill a tensor of all rows.
    lengths = [part.end - part.start for part in batch.segments]
    pieces = (x,) if len(lengths) == 1 else x.split(lengths)
    rows = [own if function is None else function(own) for own, function in zip(pieces, functions, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def frozen_linear(in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    """An ``nn.Linear`` without gradients."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    return layer.requires_grad_(False)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of adapters, routing and statistics over a base of this dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
