"""From samples to fused batches: which samples an adapter learns from at each step, and who shares a forward.

An adapter's micro-batches are cut from its own config and seed alone. The dispatcher only chooses which whole
micro-batches run together, so a neighbour can change how fast an adapter learns, but not what.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_peft.data.samples import Sample
from moe_peft.model.batch import IGNORE_INDEX, BatchConfig, ModelInput
from moe_peft.model.draws import generator_for


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one adapter that go through one forward.

    Args:
        adapter: whose they are.
        step: the adapter's optimizer step, from 0.
        index: which micro-batch of the step.
        is_last: the optimizer steps after it.
        samples: what it holds.
        step_supervised: supervised tokens of the whole optimizer step.
        step_tokens: all tokens of the whole optimizer step.
        part: 0 for a whole micro-batch, another number for each part of one that was split.
        inserted_tokens: virtual tokens that the adapter puts before each sample, and that cost what tokens cost.
    """

    adapter: str
    step: int
    index: int
    is_last: bool
    samples: tuple[Sample, ...]
    step_supervised: int
    step_tokens: int
    part: int = 0
    inserted_tokens: int = 0

    @property
    def draw_index(self) -> int:
        """What selects its random draws within the step: the micro-batch, and the part if it was split."""
        return self.index + (self.part << 32)

    @property
    def num_tokens(self) -> int:
        """Tokens of this micro-batch, virtual ones included."""
        return sum(len(sample.input_ids) + self.inserted_tokens for sample in self.samples)


class StepPlan:
    """What one adapter learns from at each of its optimizer steps: a pure function of its own settings.

    Args:
        adapter: its name, which enters the shuffling.
        samples: its training data.
        batch_size: samples an optimizer step; an epoch's last step takes what is left.
        micro_batch_size: samples a forward.
        num_epochs: passes over the data, each shuffled anew.
        max_steps: optimizer steps, instead of what ``num_epochs`` would give.
        seed: of the shuffling.
        inserted_tokens: as in ``MicroBatch``.
    """

    def __init__(
        self,
        adapter: str,
        samples: Sequence[Sample],
        *,
        batch_size: int,
        micro_batch_size: int,
        num_epochs: int,
        max_steps: int | None,
        seed: int,
        inserted_tokens: int = 0,
    ) -> None:
        self.adapter = adapter
        self.samples = tuple(samples)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.inserted_tokens = inserted_tokens
        self.steps_per_epoch = -(-len(self.samples) // batch_size)
        self.num_steps = max_steps if max_steps is not None else num_epochs * self.steps_per_epoch
        self._order: tuple[int, list[int]] = (-1, [])  # the last epoch asked for, and its order

    def tokens_of(self, sample: Sample) -> int:
        """Tokens that a sample costs."""
        return len(sample.input_ids) + self.inserted_tokens

    def supervised_in(self, sample: Sample) -> int:
        """Tokens of a sample that carry a loss: the first is predicted only from a virtual token before it."""
        is_first = bool(self.inserted_tokens) and sample.labels[0] != IGNORE_INDEX
        return sample.num_supervised_tokens + is_first

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of one optimizer step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._epoch_order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        chosen = [self.samples[i] for i in order]
        supervised = sum(map(self.supervised_in, chosen))
        tokens = sum(map(self.tokens_of, chosen))
        starts = range(0, len(chosen), self.micro_batch_size)
        return [
            MicroBatch(
                adapter=self.adapter,
                step=step,
                index=index,
                is_last=index == len(starts) - 1,
                samples=tuple(chosen[start : start + self.micro_batch_size]),
                step_supervised=supervised,
                step_tokens=tokens,
                inserted_tokens=self.inserted_tokens,
            )
            for index, start in enumerate(starts)
        ]

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            generator = generator_for(self.seed, self.adapter, "shuffle", epoch)
            self._order = (epoch, torch.randperm(len(self.samples), generator=generator).tolist())
        return self._order[1]


@dataclass(frozen=True)
class Cursor:
    """Where an adapter stands between two forwards.

    Args:
        step: of its next micro-batch.
        index: which micro-batch of that step.
        start: its virtual time at the beginning of its training.
    """

    step: int = 0
    index: int = 0
    start: float = 0.0


class Dispatcher:
    """Chooses which adapters' next micro-batches share a forward.

    The choice is fair by virtual time. That of an adapter is the share of its own steps it has taken, counted from
    where the furthest behind of the others stood when it came: a late one neither holds the others up until it has
    caught up with them nor waits for them.

    Args:
        plans: one an adapter, in the order in which they share a batch; ``add`` brings more.
        max_batch_tokens: tokens of a fused forward. A micro-batch that is larger by itself runs alone, whole.
    """

    def __init__(self, plans: Mapping[str, StepPlan], max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._plans: dict[str, StepPlan] = {}
        self._starts: dict[str, float] = {}
        self._waiting: dict[str, list[MicroBatch]] = {}
        for name, plan in plans.items():
            self.add(name, plan, Cursor())

    def add(self, adapter: str, plan: StepPlan, cursor: Cursor | None = None) -> None:
        """Let an adapter join the others, behind them in a batch.

        Args:
            adapter: its name.
            plan: what it learns from.
            cursor: where it goes on, as ``cursor`` gave it; None: a newcomer.
        """
        if plan.num_steps == 0:
            return
        furthest_behind = min(map(self._virtual_time, self._waiting), default=0.0)
        cursor = cursor or Cursor(start=furthest_behind)
        self._plans[adapter] = plan
        self._starts[adapter] = cursor.start
        self._waiting[adapter] = plan.micro_batches(cursor.step)[cursor.index :]

    def cursor(self, adapter: str) -> Cursor:
        """Where an adapter stands."""
        front = self._waiting[adapter][0]
        return Cursor(front.step, front.index, self._starts[adapter])

    def rejoin(self, adapter: str, plan: StepPlan, step: int) -> None:
        """Let an adapter that has been away go on from a step, level with the one that is furthest behind."""
        furthest_behind = min(map(self._virtual_time, self._waiting), default=0.0)
        self.add(adapter, plan, Cursor(step, 0, furthest_behind - step / plan.num_steps))

    @property
    def adapters(self) -> list[str]:
        """Those with micro-batches left, in the order in which they share a batch."""
        return [name for name in self._plans if name in self._waiting]

    def next_batch(self) -> list[MicroBatch]:
        """The micro-batches of the next forward, at most one an adapter; empty when every adapter is through.

        The adapter that is furthest behind goes first; the others join while they fit.
        """
        by_time = sorted(self.adapters, key=self._virtual_time)
        chosen: set[str] = set()
        budget = self._max_batch_tokens
        for name in by_time:
            size = self._waiting[name][0].num_tokens
            if not chosen or size <= budget:
                chosen.add(name)
                budget -= size
        return [self._pop(name) for name in self.adapters if name in chosen]

    def remove(self, adapter: str) -> None:
        """Take an adapter out of the run; one that is not in it is no error."""
        for held in (self._waiting, self._plans, self._starts):
            held.pop(adapter, None)

    def _virtual_time(self, name: str) -> float:
        front = self._waiting[name][0]
        done = front.step + front.index / (front.index + len(self._waiting[name]))
        return self._starts[name] + done / self._plans[name].num_steps

    def _pop(self, name: str) -> MicroBatch:
        micro_batch = self._waiting[name].pop(0)
        if micro_batch.is_last:
            if micro_batch.step + 1 < self._plans[name].num_steps:
                self._waiting[name] = self._plans[name].micro_batches(micro_batch.step + 1)
            else:
                del self._waiting[name]
        return micro_batch


def fuse(parts: Sequence[tuple[BatchConfig, Sequence[Sample]]], device: torch.device) -> ModelInput:
    """Lay the samples of several adapters end to end.

    Args:
        parts: for each adapter a BatchConfig, whose sample indices are filled in here, and its samples.
        device: where the tensors go.
    """
    samples = [sample for _, part in parts for sample in part]
    lengths = torch.tensor([0] + [len(sample.input_ids) for sample in samples], dtype=torch.int32)
    configs = []
    start = 0
    for config, part in parts:
        end = start + len(part)
        configs.append(BatchConfig(config.adapter_name, start, end, config.step, config.micro_batch))
        start = end
    return ModelInput(
        torch.tensor([token for sample in samples for token in sample.input_ids], device=device),
        lengths.cumsum(0, dtype=torch.int32),
        tuple(configs),
        torch.tensor([label for sample in samples for label in sample.labels], device=device),
    )
