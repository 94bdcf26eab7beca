"""What a run is going to cost in time and memory: tried out on a few layers, and extended to the whole run."""

import bisect
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moe_peft.data.dispatcher import MicroBatch
from moe_peft.data.samples import Sample
from moe_peft.training.forecast.probe import Probe
from moe_peft.training.forecast.work import FusedStep, RunForecast

PROBE_SECONDS = 5.0
_FEWEST_STEPS, _MOST_STEPS = 2, 8
_WARM_UP_TOKENS = 128
# Of the probe's time, what its first try of the largest step may take.
_LARGEST_SHARE = 0.3
# On a CPU, fitted to the runs that benchmarks/plan.py names: bytes of libraries, their compiled products and scratch;
# and the share of a step that is freed memory nothing fits into again.
_CPU_LIBRARIES, _CPU_SLACK = 190e6, 0.27
# On a GPU: blocks that the caching allocator holds and cannot hand out.
_GPU_SLACK = 0.05


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """Peak memory in bytes.

    Args:
        process: what it holds beside the model: tokenizer, samples and libraries.
        base: the frozen weights.
        adapters: weights, optimizer states and copies of the adapters that train at once.
        step: what the largest fused step, or evaluation, keeps for its backward and is just computing.
    """

    process: int
    base: int
    adapters: int
    step: int

    @property
    def total(self) -> int:
        """Of all."""
        return self.process + self.base + self.adapters + self.step


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What the probe says of the run.

    Args:
        memory: its peak.
        step_seconds: of all fused steps.
        eval_seconds: of all evaluations.
        bytes_by_token: of the step that takes most memory.
    """

    memory: MemoryForecast
    step_seconds: float
    eval_seconds: float
    bytes_by_token: float


def forecast_cost(forecast: RunForecast, data_bytes: int) -> RunCost:
    """Try some steps of the run out, for about ``PROBE_SECONDS``.

    Args:
        forecast: the run.
        data_bytes: what tokenizer and samples hold.
    """
    end = time.perf_counter() + PROBE_SECONDS
    chosen = [forecast.steps[i] for i in _spread(forecast.steps, _MOST_STEPS)]
    largest = _largest_by_methods(forecast)
    held_out = _held_out(forecast)
    names = {name for step in (*chosen, *largest) for name in step.names} | held_out.keys()
    adapters = {name: forecast.adapters[name] for name in forecast.adapters if name in names}
    probe = Probe(forecast.shape, adapters, forecast.config.activation_checkpointing, forecast.tokenizer)
    limit = _token_limit(probe, forecast.micro_batches(largest[0]))

    def of_step(measure: Callable[[list[MicroBatch]], float], step: FusedStep) -> float:
        share = min(1.0, limit / step.num_tokens)
        parts = [_shortened(part, share) for part in forecast.micro_batches(step)]
        return measure(parts) * step.num_tokens / sum(part.num_tokens for part in parts)

    def of_evaluation(measure: Callable[[Mapping[str, Sequence[Sample]], int], float]) -> float:
        """By token."""
        some = _first_samples(held_out, min(limit, forecast.config.max_batch_tokens))
        return measure(some, forecast.config.max_batch_tokens) / _num_tokens(some) if some else 0.0

    by_step = {step: of_step(probe.memory_of_step, step) + _accumulated(forecast) for step in largest}
    hungriest = max(by_step, key=lambda step: by_step[step])
    eval_tokens = min(_num_tokens(held_out), forecast.config.max_batch_tokens)
    peak = max(by_step[hungriest], of_evaluation(probe.memory_of_evaluation) * eval_tokens)
    memory = _memory(forecast, data_bytes, peak)
    eval_seconds = of_evaluation(probe.seconds_of_evaluation) * sum(
        adapter.num_evaluations * _num_tokens({name: adapter.eval_samples})
        for name, adapter in forecast.adapters.items()
    )
    found: list[float] = []  # seconds a token
    for step in chosen:
        if len(found) < _FEWEST_STEPS or time.perf_counter() < end:
            found.append(of_step(probe.seconds_of_step, step) / step.num_tokens)
    middle = sorted(found)[len(found) // 4 : len(found) - len(found) // 4]  # without what the machine did beside it
    return RunCost(
        memory=memory,
        step_seconds=statistics.mean(middle) * sum(step.num_tokens for step in forecast.steps),
        eval_seconds=eval_seconds,
        bytes_by_token=memory.step / hungriest.num_tokens,
    )


def _memory(forecast: RunForecast, data_bytes: int, step_bytes: float) -> MemoryForecast:
    on_cpu = forecast.shape.device.type == "cpu"
    slack = _CPU_SLACK if on_cpu else _GPU_SLACK
    return MemoryForecast(
        process=data_bytes + round(_CPU_LIBRARIES) if on_cpu else 0,
        base=forecast.base_bytes,
        adapters=sum(sorted((a.state_bytes for a in forecast.adapters.values()), reverse=True)[: _at_once(forecast)]),
        step=round(step_bytes * (1 + slack)),
    )


def _at_once(forecast: RunForecast) -> int:
    return min(len(forecast.adapters), forecast.config.max_concurrent_adapters or len(forecast.adapters))


def num_that_fit(forecast: RunForecast, cost: RunCost, available: float, most: int = 1000) -> int:
    """How many adapters can train at once in so many bytes: the run's largest, and then more like the largest.

    Args:
        forecast: the run.
        cost: what it costs.
        available: bytes.
        most: where to stop.
    """
    adapters = sorted(forecast.adapters.values(), key=lambda adapter: adapter.state_bytes, reverse=True)
    used, tokens = float(cost.memory.process + cost.memory.base), 0
    for count in range(1, most + 1):
        adapter = adapters[count - 1] if count <= len(adapters) else adapters[0]
        used += adapter.state_bytes
        limit = max(forecast.config.max_batch_tokens, adapter.largest_micro_batch, tokens)
        tokens = min(tokens + adapter.largest_micro_batch, limit)
        if used + cost.bytes_by_token * tokens > available:
            return count - 1
    return most


def _spread(steps: Sequence[FusedStep], count: int) -> list[int]:
    """Indices of steps that every token of the run is as likely to be in: the middle, quarters, eighths ..."""
    ends = list(itertools.accumulate(step.num_tokens for step in steps))
    halvings = (odd / parts for power in range(1, count + 1) for parts in (1 << power,) for odd in range(1, parts, 2))
    wanted = [ends[-1] * share for share in itertools.islice(halvings, count)]
    return [bisect.bisect_left(ends, tokens) for tokens in wanted]


def _largest_by_methods(forecast: RunForecast) -> list[FusedStep]:
    """The steps that may take most memory: of each set of methods the longest, if it is not far from the longest."""
    found: dict[frozenset[str], FusedStep] = {}
    for step in forecast.steps:
        methods = frozenset(forecast.adapters[name].job.method for name in step.names)
        if methods not in found or step.num_tokens > found[methods].num_tokens:
            found[methods] = step
    ordered = sorted(found.values(), key=lambda step: -step.num_tokens)
    return [step for step in ordered if step.num_tokens > 0.6 * ordered[0].num_tokens]


def _token_limit(probe: Probe, micro_batches: Sequence[MicroBatch]) -> float:
    """Tokens of a step that the probe has time for; and the machine is warm now."""
    share = min(1.0, _WARM_UP_TOKENS / sum(part.num_tokens for part in micro_batches))
    parts = [_shortened(part, share) for part in micro_batches]
    probe.seconds_of_forward_backward(parts)
    seconds = probe.seconds_of_forward_backward(parts)
    return max(_WARM_UP_TOKENS, _LARGEST_SHARE * PROBE_SECONDS / seconds * sum(part.num_tokens for part in parts))


def _shortened(micro_batch: MicroBatch, share: float) -> MicroBatch:
    """As many samples as make up a share of the tokens, the last one cut; all of them where the share is 1."""
    if share == 1.0:
        return micro_batch
    samples, wanted = [], max(2, round(share * micro_batch.num_tokens))
    for sample in micro_batch.samples:
        if wanted < 2:
            break
        own = max(2, wanted - micro_batch.inserted_tokens)
        samples.append(dataclasses.replace(sample, input_ids=sample.input_ids[-own:], labels=sample.labels[-own:]))
        wanted -= len(sample.input_ids) + micro_batch.inserted_tokens
    return dataclasses.replace(micro_batch, samples=tuple(samples))


def _accumulated(forecast: RunForecast) -> int:
    """Gradients that wait for further micro-batches while a step runs."""
    return sum(adapter.weight_bytes for adapter in forecast.adapters.values() if adapter.accumulates)


def _held_out(forecast: RunForecast) -> dict[str, Sequence[Sample]]:
    return {name: adapter.eval_samples for name, adapter in forecast.adapters.items() if adapter.eval_samples}


def _first_samples(held_out: Mapping[str, Sequence[Sample]], limit: float) -> dict[str, list[Sample]]:
    """Samples in order, as many as stay below the limit together, and one at least."""
    chosen: dict[str, list[Sample]] = {}
    taken = 0
    for name, samples in held_out.items():
        for sample in samples:
            taken += len(sample.input_ids)
            if taken > limit and chosen:
                return chosen
            chosen.setdefault(name, []).append(sample)
    return chosen


def _num_tokens(held_out: Mapping[str, Sequence[Sample]]) -> int:
    return sum(len(sample.input_ids) for samples in held_out.values() for sample in samples)
