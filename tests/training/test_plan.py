"""The plan as it is printed, and what it is made of."""

import dataclasses
import mmap
from pathlib import Path

import pytest
import torch
from tiny_run import adapter_entry, instructions, quiet_console, run_config, write_jsonl

from moe_peft.training.forecast import available, cost
from moe_peft.training.forecast.available import available_bytes, held_bytes
from moe_peft.training.forecast.cost import MemoryForecast, RunCost, num_that_fit
from moe_peft.training.forecast.plan import print_plan
from moe_peft.training.forecast.work import FusedStep, forecast_run


@pytest.fixture
def config(base, tmp_path):
    """Two adapters, one of them held to its prompts' ends and evaluated."""
    data = write_jsonl(tmp_path / "data.jsonl", [*instructions(20), {"instruction": "x" * 90, "output": "y"}])
    entries = [
        adapter_entry("plain", data, cutoff_len=40),
        adapter_entry("mixed", data, method="mixlora", num_experts=4, top_k=2, eval_data=data),
    ]
    return run_config(base, tmp_path / "out", *entries)


@pytest.fixture
def no_time(monkeypatch):
    """The probe tries as little as it may."""
    monkeypatch.setattr(cost, "PROBE_SECONDS", 0.01)


@pytest.mark.usefixtures("no_time")
def test_what_is_printed(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    console = quiet_console()
    print_plan(config, console)
    text = console.file.getvalue()
    assert sorted(tmp_path.rglob("*")) == before
    forecast = forecast_run(config)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    for name, adapter in forecast.adapters.items():
        trainable, router = adapter.num_trainable, adapter.num_router
        assert rows[name][2:4] == [f"{trainable:,}", f"{trainable - router:,}"]
        assert rows[name][5:] == ["21", str(int(name == "plain")), f"{adapter.num_tokens:,}", "3"]
    tokens = [step.num_tokens for step in forecast.steps]
    assert f"3 fused steps of {sorted(tokens)[1]:,} tokens (median; at most {max(tokens):,})" in text
    assert "shared by 2.0 adapters" in text
    for start in ("Peak memory: about 0.", "Fit at once: all 2 adapters", "Run time: about 0:0"):
        assert start in text
    assert "evaluations 0:0" in text


@pytest.mark.usefixtures("no_time")
def test_a_machine_that_is_too_small_is_told(config, monkeypatch):
    texts = []
    for size in (100, 10**12):
        monkeypatch.setattr("moe_peft.training.forecast.plan.available_bytes", lambda device, size=size: size)
        console = quiet_console()
        print_plan(config, console)
        texts.append(console.file.getvalue())
    assert "NOT ENOUGH" in texts[0]
    assert "Fit at once: none; try" in texts[0]
    assert "NOT ENOUGH" not in texts[1]


@pytest.mark.usefixtures("no_time")
def test_larger_steps_cost_more(tmp_path, base, data):
    """The forecast of memory and time follows the batches, which a constant would not."""
    costs = {}
    for size in (2, 16):
        forecast = forecast_run(run_config(base, tmp_path / "out", adapter_entry("a", data, batch_size=size)))
        costs[size] = cost.forecast_cost(forecast, 0)
    assert costs[16].memory.step > 3 * costs[2].memory.step
    assert costs[16].memory.adapters == costs[2].memory.adapters


def cost_of(process, base, by_token, step):
    memory = MemoryForecast(process=process, base=base, adapters=0, step=step)
    return RunCost(memory=memory, step_seconds=0.0, eval_seconds=0.0, bytes_by_token=by_token)


def test_how_many_fit(config):
    """Counted by hand: the larger adapter first, then the smaller, then more like the larger."""
    forecast = forecast_run(dataclasses.replace(config, max_batch_tokens=10**9))
    small, large = (forecast.adapters[name] for name in ("plain", "mixed"))
    assert small.state_bytes < large.state_bytes
    cost = cost_of(process=1000, base=5000, by_token=10.0, step=0)
    needs = []
    for group in ([large], [large, small], [large, small, large]):
        tokens = sum(adapter.largest_micro_batch for adapter in group)
        needs.append(6000 + sum(adapter.state_bytes for adapter in group) + 10 * tokens)
    for count, need in enumerate(needs, start=1):
        assert num_that_fit(forecast, cost, need) == count
        assert num_that_fit(forecast, cost, need - 1) == count - 1
    assert num_that_fit(forecast, cost, 10**12, most=7) == 7


def test_adapters_that_wait_for_room_in_a_batch_need_none(config):
    """Beyond ``max_batch_tokens`` further adapters cost what they hold, and no tokens."""
    forecast = forecast_run(dataclasses.replace(config, max_batch_tokens=1))
    large, small = forecast.adapters["mixed"], forecast.adapters["plain"]
    tokens = max(large.largest_micro_batch, small.largest_micro_batch)
    need = large.state_bytes + small.state_bytes + 10 * tokens
    assert num_that_fit(forecast, cost_of(0, 0, 10.0, 0), need) == 2
    assert num_that_fit(forecast, cost_of(0, 0, 10.0, 0), need - 1) == 1


def test_sampled_steps_stand_for_all_tokens():
    """Every token is as likely to be in a sampled step: half the picks fall to a step with half the tokens."""
    steps = [FusedStep((), 10)] * 50 + [FusedStep((), 500)]
    picks = cost._spread(steps, 7)
    assert picks[0] in (49, 50)
    assert sum(pick == 50 for pick in picks) in (3, 4)
    assert cost._spread([FusedStep((), 3)], 2) == [0, 0]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99, 1.0])
def test_a_shortened_micro_batch(config, share):
    forecast = forecast_run(config)
    for micro_batch in forecast.micro_batches(forecast.steps[0]):
        short = cost._shortened(micro_batch, share)
        assert abs(short.num_tokens - share * micro_batch.num_tokens) <= 2
        assert all(len(sample.input_ids) == len(sample.labels) >= 2 for sample in short.samples)
    assert short.samples[0].input_ids == micro_batch.samples[0].input_ids[-len(short.samples[0].input_ids) :]


def test_memory_of_the_process_is_counted():
    before = held_bytes()
    # From the system itself: the allocator may have enough at hand, from other tests.
    with mmap.mmap(-1, 160_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(bytes(len(block)))
        assert held_bytes() - before == pytest.approx(len(block), rel=0.1)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    everything = available_bytes(torch.device("cpu"))
    assert everything is not None
    assert everything > 10**8
    for name, text in {"memory.max": "50000000\n", "memory.current": "30000000\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 4000000\n")
    monkeypatch.setattr(available, "_CGROUP", Path(tmp_path))
    monkeypatch.setattr(available, "held_bytes", lambda: 0)
    assert available_bytes(torch.device("cpu")) == 24_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(torch.device("cpu")) > 10**8
