"""One adapter's micro-batch run alone, with the draws and the routing that it had in the fused batch."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_peft.data.dispatcher import MicroBatch
from moe_peft.model.draws import generator_for
from moe_peft.model.forward import Replay, replaying
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.adapter_run import AdapterRun
from moe_peft.training.fused_step import Outcome, run_fused

# How a repeat nudges the embedded tokens: the share of their features, and by how many units in the last place. Enough
# to have everything behind it rounded anew, and of the size of one product's rounding: 16-bit types round a sum once,
# wide ones after every term.
NUDGES = {torch.float64: (1.0, 4), torch.float32: (1.0, 4), torch.float16: (1 / 64, 1), torch.bfloat16: (1 / 64, 1)}


class Alone:
    """Runs what one adapter had in a fused batch again, without its neighbours.

    Args:
        model: that carries it.
        run: its training.
        fused: what the fused batch gave it.
        say: takes messages.
    """

    def __init__(self, model: LlamaForCausalLM, run: AdapterRun, fused: Outcome, say: Callable[[str], None]) -> None:
        self._model = model
        self._run = run
        self._fused = fused
        self._say = say
        lengths = [len(sample.input_ids) for sample in fused.micro_batch.samples]
        self._edges = list(itertools.accumulate(lengths, initial=0))

    def __call__(
        self, order: Sequence[int] | None = None, nudge: int | None = None
    ) -> tuple[Outcome, tuple[Tensor, ...]]:
        """One forward and backward; nothing is accumulated.

        Args:
            order: of the samples; None: the fused batch's. Dropout, jitter and routing follow them.
            nudge: changes the embedded tokens by a rounding here and there, another number in other places.

        Returns:
            What it gave, and what the routers said by themselves, ``[T, E]`` a routed layer in the fused order.
        """
        fused = self._fused.micro_batch
        order = range(len(fused.samples)) if order is None else order
        tokens = torch.cat([torch.arange(self._edges[i], self._edges[i + 1]) for i in order]).to(self._model.device)
        routed = tuple(logits[tokens] for logits in self._fused.router_logits or ())
        replay = Replay(tokens, self._edges[-1], routed)
        micro_batch = dataclasses.replace(fused, samples=tuple(fused.samples[i] for i in order))
        with replaying(replay), self._nudged(nudge):
            outcome = self._outcome(micro_batch)
        back = tokens.argsort()
        return outcome, tuple(replay.own_router_logits[i][back] for i in sorted(replay.own_router_logits))

    def _outcome(self, micro_batch: MicroBatch) -> Outcome:
        name, scale = micro_batch.adapter, self._run.loss_scale
        scales = {} if scale is None else {name: scale.value}
        outcomes = run_fused(self._model, [micro_batch], {name: self._run.parameters}, self._say, scales)
        if len(outcomes) > 1:
            return Outcome(micro_batch, failure="out of memory")
        return outcomes[0]

    @contextmanager
    def _nudged(self, number: int | None) -> Iterator[None]:
        if number is None:
            yield
            return
        micro_batch = self._fused.micro_batch
        key = ("proof", micro_batch.adapter, micro_batch.step, micro_batch.index, number)

        def nudge(module: torch.nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
            draws = torch.rand(embedded.shape, generator=generator_for(*key)).to(embedded.device)
            share, units = NUDGES[embedded.dtype]
            ups, downs = draws < share / 2, draws >= 1 - share / 2
            steps = (ups.to(embedded.dtype) - downs.to(embedded.dtype)) * (units * torch.finfo(embedded.dtype).eps)
            return embedded * (1 + steps)

        handle = self._model.embed_tokens.register_forward_hook(nudge)
        try:
            yield
        finally:
            handle.remove()
