"""A few layers of the base model's shape with random weights, on which steps of the run are tried out.

What they take in time and memory extends to all layers: the same ones, over and over.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moe_peft import ops
from moe_peft.data.dispatcher import MicroBatch
from moe_peft.data.samples import Sample
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.io.base_model import BaseModelShape
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.adapter_run import AdapterRun
from moe_peft.training.evaluation import evaluate
from moe_peft.training.forecast.live_memory import LiveMemory, follow
from moe_peft.training.forecast.work import AdapterForecast
from moe_peft.training.fused_step import run_fused

# One that others stand on and below, one in between, and the last, which answers for fewer tokens.
_LAYERS = 3
_PATTERN = 1 << 20  # random values that fill all weights


class Probe:
    """The shallow model and the adapters on it.

    Args:
        shape: of the base model.
        adapters: those that any of its steps is for.
        activation_checkpointing: as the run's.
        tokenizer: of the base model, for adapters that start from a text.
    """

    def __init__(
        self,
        shape: BaseModelShape,
        adapters: Mapping[str, AdapterForecast],
        activation_checkpointing: str,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        ops.compiled_library()  # made now, and not while something is timed
        self._num_layers = shape.config.num_hidden_layers
        self._depth = min(_LAYERS, self._num_layers)
        self._model = _random_model(
            dataclasses.replace(shape, config=dataclasses.replace(shape.config, num_hidden_layers=self._depth))
        )
        self._model.activation_checkpointing_ = activation_checkpointing
        self._layers = list(self._model.layers)
        for name, adapter in adapters.items():
            config = adapter.largest.on_few_layers(self._num_layers)
            self._model.add_adapter(name, config, tokenizer=tokenizer)
        self._runs: dict[tuple[int, str], AdapterRun] = {}
        self._adapters = adapters

    def seconds_of_step(self, micro_batches: Sequence[MicroBatch]) -> float:
        """What a forward, a backward and the optimizer steps of these micro-batches take with all layers."""
        return self._for_all_layers(lambda: self._step(micro_batches))

    def seconds_of_forward_backward(self, micro_batches: Sequence[MicroBatch]) -> float:
        """What these take with the few layers of the probe."""
        return self._seconds(lambda: self._forward_backward(micro_batches))

    def seconds_of_evaluation(self, held_out: Mapping[str, Sequence[Sample]], max_batch_tokens: int) -> float:
        """What the evaluation of these samples takes with all layers."""
        return self._for_all_layers(lambda: evaluate(self._model, held_out, max_batch_tokens))

    def memory_of_step(self, micro_batches: Sequence[MicroBatch]) -> int:
        """The most bytes that a step takes with all layers, beyond weights and what adapters hold between two steps."""
        first, second = self._layers[0], self._layers[min(1, self._depth - 1)]
        for part in micro_batches:
            self._run_of(part.adapter)  # what it holds between two steps is no step's
        with follow(self._model.device) as live, _marked(live, first, second):
            self._forward_backward(micro_batches)
        more = self._num_layers - self._depth
        if not more or not live.has("backward"):
            return live.peak()
        kept = live.at("second") - live.at("first")
        further_gradients = sum(self._further_gradients(part.adapter) for part in micro_batches)
        return max(
            live.peak(last="first"),
            live.peak("first", "backward") + more * kept,
            live.peak("backward") + further_gradients,
        )

    def _further_gradients(self, name: str) -> int:
        """Bytes of the gradients of an adapter's weights that only all layers together have."""
        parameters = self._run_of(name).parameters
        further = self._adapters[name].num_largest - sum(weight.numel() for weight in parameters)
        return further * parameters[0].itemsize

    def memory_of_evaluation(self, held_out: Mapping[str, Sequence[Sample]], max_batch_tokens: int) -> int:
        """The most bytes that an evaluation takes; it keeps nothing from one layer to the next."""
        with follow(self._model.device) as live:
            evaluate(self._model, held_out, max_batch_tokens)
        return live.peak()

    def _for_all_layers(self, action: Callable[[], object]) -> float:
        """Seconds of an action with one layer, and with a few; the rest of them take as long as these.

        The first time products of new shapes are compiled, whatever the number of layers: that counts once.
        """
        first = self._seconds(action)
        if self._depth == self._num_layers:
            return first
        again = self._seconds(action)
        with self._only_last_layer():
            alone = self._seconds(action)
        each = max(0.0, again - alone) / (self._depth - 1)
        return first + each * (self._num_layers - self._depth)

    def _seconds(self, action: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        action()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._model.device.type != "cpu":
            torch.accelerator.synchronize()

    @contextmanager
    def _only_last_layer(self) -> Iterator[None]:
        self._model.layers = nn.ModuleList(self._layers[-1:])
        try:
            yield
        finally:
            self._model.layers = nn.ModuleList(self._layers)

    def _run_of(self, name: str) -> AdapterRun:
        """An adapter's training on the layers that are there now."""
        key = len(self._model.layers), name
        if key not in self._runs:
            adapter = self._adapters[name]
            data = adapter.data
            self._runs[key] = AdapterRun(adapter.job, self._model, data.plan, data.train_set, data.eval_set)
        return self._runs[key]

    def _step(self, micro_batches: Sequence[MicroBatch]) -> None:
        for outcome in self._forward_backward(micro_batches):
            run = self._run_of(outcome.micro_batch.adapter)
            run.take_in(outcome)
            if outcome.micro_batch.is_last:
                run.step(outcome.micro_batch)

    def _forward_backward(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        self._model.train()
        parameters = {part.adapter: self._run_of(part.adapter).parameters for part in micro_batches}
        return run_fused(self._model, micro_batches, parameters, lambda message: None)


@contextmanager
def _marked(live: LiveMemory, first: nn.Module, second: nn.Module) -> Iterator[None]:
    """Marks where the first and the second layer end, and where the backward comes back to the end of the first."""
    seen: set[str] = set()

    def mark(name: str) -> None:
        if name not in seen:  # a layer that is computed again in the backward ends twice
            seen.add(name)
            live.mark(name)

    def end_of_first(module: nn.Module, arguments: Any, output: Any) -> None:
        if "first" not in seen and output[0].requires_grad:
            output[0].register_hook(lambda gradient: mark("backward"))
        mark("first")

    hooks = [
        first.register_forward_hook(end_of_first),
        second.register_forward_hook(lambda module, arguments, output: mark("second")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _random_model(shape: BaseModelShape) -> LlamaForCausalLM:
    """A model of this shape, filled at the speed of memory: drawing every weight would take too long."""
    model = shape.empty_model()
    generator = torch.Generator(shape.device).manual_seed(0)
    pattern = torch.randn(_PATTERN, generator=generator, device=shape.device).mul_(0.02).to(shape.dtype)
    for name, parameter in list(model.named_parameters()):
        weight = torch.ones(parameter.shape, dtype=shape.dtype, device=shape.device)
        if weight.dim() > 1:
            for part in weight.view(-1).split(_PATTERN):
                part.copy_(pattern[: part.numel()])
        module_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module_name), attribute, nn.Parameter(weight, requires_grad=False))
    if shape.config.tie_word_embeddings:
        model.lm_head_.weight = model.embed_tokens.weight
    return model
