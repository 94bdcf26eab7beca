"""The frozen linear layer that carries adapters, and the dictionary it keeps them in.

Letters: T tokens, I input features, O output features, R rank.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_peft import ops

if TYPE_CHECKING:
    from moe_peft.model.forward import ForwardBatch


class AdapterDict(nn.Module):
    """A registered dictionary of modules whose keys may hold dots, as in ``moe.qa.experts.0``.

    ``nn.ModuleDict`` refuses dots because they separate state-dict keys; here they are stored as ``/``. It also refuses
    names of its own methods, such as ``train``; here no name becomes an attribute.
    """

    def train(self, mode: bool = True) -> "AdapterDict":
        """As ``nn.Module.train``, which would mistake its attribute for an adapter named ``training``."""
        self.__dict__["training"] = mode
        for module in self.children():
            module.train(mode)
        return self

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name.replace(".", "/")] = module

    def __getitem__(self, name: str) -> Any:
        module = self.get(name)
        if module is None:
            raise KeyError(name)
        return module

    def __delitem__(self, name: str) -> None:
        del self._modules[name.replace(".", "/")]

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


class Lora(nn.Module):
    """One low-rank factor pair: ``delta = scaling * lora_B lora_A``.

    Args:
        lora_A: ``[R, I]``.
        lora_B: ``[O, R]``.
        scaling: factor of the product.
        dropout: probability of zeroing a feature of the input during training.
        seed: of the adapter's draws.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, *, scaling: float, dropout: float, seed: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling_ = scaling
        self.dropout_ = dropout
        self.seed_ = seed


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
    ranges = []
    for segment in batch.segments:
        loras = [layer.loras_.get(segment.adapter_name) or layer.loras_.get(segment.task) for layer in layers]
        one = next((lora for lora in loras if lora is not None), None)
        if one is None:
            continue
        mask = batch.dropout_mask(
            segment, one.seed_, one.dropout_, layers[0].layer_idx_, layers[0].input_name_, x.value
        )
        factors = tuple((lora.lora_A, lora.lora_B) if lora is not None else None for lora in loras)
        scalings = tuple(lora.scaling_ if lora is not None else 0.0 for lora in loras)
        ranges.append(ops.LoraRange(segment.start, segment.end, factors, scalings, mask))
    base_layers = [layer.base_layer_ for layer in layers]
    return ops.lora_linear(x, [base.weight for base in base_layers], [base.bias for base in base_layers], ranges)


def frozen_linear(in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    """An ``nn.Linear`` without gradients."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    return layer.requires_grad_(False)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of adapters, routing and statistics over a base of this dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
