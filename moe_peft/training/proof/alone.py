"""One adapter's micro-batch run alone, with the draws and the routing that it had in the fused batch."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_peft import ops
from moe_peft.data.dispatcher import MicroBatch
from moe_peft.model.forward import Replay, replaying
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.adapter_run import AdapterRun
from moe_peft.training.fused_step import Outcome, run_fused


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

    def __call__(self, order: Sequence[int] | None = None) -> tuple[Outcome, tuple[Tensor, ...]]:
        """One forward and backward; nothing is accumulated.

        Args:
            order: of the samples; None: the fused batch's. Dropout, jitter and routing follow them.

        Returns:
            What it gave, and what the routers said by themselves, ``[T, E]`` a routed layer in the fused order.
        """
        fused = self._fused.micro_batch
        order = range(len(fused.samples)) if order is None else order
        tokens = torch.cat([torch.arange(self._edges[i], self._edges[i + 1]) for i in order]).to(self._model.device)
        routed = tuple(logits[tokens] for logits in self._fused.router_logits or ())
        replay = Replay(tokens, self._edges[-1], routed)
        micro_batch = dataclasses.replace(fused, samples=tuple(fused.samples[i] for i in order))
        with replaying(replay), ops.batch_invariant():
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
