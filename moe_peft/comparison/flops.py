"""FLOPs of a training step: its very operations run on the meta device, where a tensor has a shape and no memory.

Letters: L layers, S tokens of a sample.
"""

import dataclasses
from collections.abc import Callable
from math import prod
from typing import Any

import torch

from moe_peft.io.base_model import BaseModelShape
from moe_peft.model.batch import BatchConfig, ModelInput
from moe_peft.model.llama import LlamaForCausalLM

NAME = "adapter"
# The layer below, which hands no gradient on, the last, and one in between; all others are like that one.
_DEPTHS = (2, 3)

Attach = Callable[[LlamaForCausalLM], None]


def flops_per_token(shape: BaseModelShape, attach: Attach, context: int) -> float:
    """Forward and backward of one sample that is learnt whole, divided by its tokens.

    A multiplication and an addition of matrix products count as one FLOP each; what works element by element is not
    counted. What a step does once, such as a norm of the weights, is spread over the sample's tokens.

    Args:
        shape: of the base model.
        attach: puts the adapter ``NAME`` on a model on the meta device.
        context: S.
    """
    num_layers = shape.config.num_hidden_layers
    if num_layers <= _DEPTHS[1]:
        return _count(_model(shape, attach), context) / context
    whole = _model(shape, attach)
    try:
        few, more = (_model(_of_depth(shape, depth), attach) for depth in _DEPTHS)
    except ValueError:  # an adapter on layers that the shallow model has not
        return _count(whole, context) / context
    if _size(whole) != _extended(_size(few), _size(more), num_layers):  # layers that are not alike
        return _count(whole, context) / context
    return _extended(_count(few, context), _count(more, context), num_layers) / context


def _of_depth(shape: BaseModelShape, depth: int) -> BaseModelShape:
    return dataclasses.replace(shape, config=dataclasses.replace(shape.config, num_hidden_layers=depth))


def _model(shape: BaseModelShape, attach: Attach) -> LlamaForCausalLM:
    model = shape.empty_model().eval()
    attach(model)
    return model


def _size(model: LlamaForCausalLM) -> int:
    return sum(weight.numel() for weight in model.adapter_parameters(NAME))


def _extended(few: int, more: int, num_layers: int) -> int:
    """What a number grows to that grows by the same amount a layer."""
    return few + (more - few) * (num_layers - _DEPTHS[0])


def _count(model: LlamaForCausalLM, context: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    tokens = torch.zeros(context, dtype=torch.long)  # on the CPU: the model looks at their values
    batch = ModelInput(tokens, torch.tensor([0, context], dtype=torch.int32), (BatchConfig(NAME, 0, 1),), tokens)
    with torch.enable_grad(), FlopCounterMode(display=False, custom_mapping=_products()) as counter:
        (output,) = model(batch)
        (output.loss + output.aux_loss).backward()
    return int(counter.get_total_flops())


def _products() -> dict[Any, Any]:
    """The products among our operations that torch's counter does not know, and how it is to count them."""
    aten = torch.ops.aten
    return {
        aten.addmm_: lambda out, a, b, *_, **__: 2 * prod(a) * b[-1],
        aten.baddbmm_: lambda out, a, b, *_, **__: 2 * prod(a) * b[-1],
        aten.mv: lambda a, b, *_, **__: 2 * prod(a),
        # Weighted sums of a table's rows.
        aten._embedding_bag: lambda table, rows, *_, **__: 2 * prod(rows) * table[1],
        aten._embedding_bag_forward_only: lambda table, rows, *_, **__: 2 * prod(rows) * table[1],
    }
