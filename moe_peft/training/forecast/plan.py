"""What ``--plan`` prints: what a run would train, and what it would take, before anything is spent."""

import statistics
from typing import TYPE_CHECKING

import torch

from moe_peft.config import TrainConfig
from moe_peft.training.display.progress_table import format_seconds
from moe_peft.training.display.summary import format_share, print_report
from moe_peft.training.forecast.available import available_bytes, held_bytes
from moe_peft.training.forecast.cost import RunCost, forecast_cost, num_that_fit
from moe_peft.training.forecast.work import AdapterForecast, RunForecast, forecast_run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_MOST_ADAPTERS = 1000


def print_plan(config: TrainConfig, console: "Console") -> None:
    """Print what a run of this config trains, on how much, and how much memory and time it is going to take.

    No weights are read and nothing is written; a few layers of random weights are tried out for some seconds.

    Args:
        config: the run.
        console: where to print.

    Raises:
        FileNotFoundError: when the base model is not there.
        ValueError: on anything for which the run would be refused.
    """

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    before = held_bytes()
    forecast = forecast_run(config)
    data_bytes = max(0, held_bytes() - before)
    say(_where(forecast))
    print_report(console, _adapters_table(list(forecast.adapters.values()), forecast.num_base))
    say(_steps(forecast))
    available = available_bytes(forecast.shape.device)  # before the probe takes its own
    cost = forecast_cost(forecast, data_bytes)
    say(_memory(cost, available))
    if available is not None:
        say(_fitting(forecast, cost, available))
    say(_time(cost))


def _where(forecast: RunForecast) -> str:
    device = forecast.shape.device
    dtype = str(forecast.shape.dtype).removeprefix("torch.")
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    return f"{forecast.config.base_model}: {forecast.num_base:,} frozen parameters, {dtype} on {device}{threads}"


def _adapters_table(adapters: list[AdapterForecast], num_base: int) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    has_skipped = any(adapter.data.train_set.num_skipped for adapter in adapters)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("adapter", style="bold", overflow="fold")
    table.add_column("method")
    counts = ("samples", "truncated", *["skipped"] * has_skipped, "tokens", "steps")
    for title in ("trainable", "without gates", "of base", *counts):
        table.add_column(title, justify="right", no_wrap=True)
    for adapter in adapters:
        sample_set = adapter.data.train_set
        table.add_row(
            Text(adapter.job.name),
            adapter.job.method,
            f"{adapter.num_trainable:,}",
            f"{adapter.num_trainable - adapter.num_router:,}",
            format_share(adapter.num_trainable, num_base),
            f"{len(sample_set.samples):,}",
            f"{sample_set.num_truncated:,}",
            *[f"{sample_set.num_skipped:,}"] * has_skipped,
            f"{adapter.num_tokens:,}",
            f"{adapter.data.plan.num_steps:,}",
        )
    return table


def _steps(forecast: RunForecast) -> str:
    tokens = [step.num_tokens for step in forecast.steps]
    shared = statistics.mean(len(step.parts) for step in forecast.steps)
    text = (
        f"{len(tokens):,} fused steps of {statistics.median(tokens):,.0f} tokens (median; at most {max(tokens):,}), "
        f"shared by {shared:.1f} adapters on average"
    )
    limit = forecast.config.max_batch_tokens
    alone = sum(size > limit for size in tokens)
    return text + (f"; {alone:,} of them above max_batch_tokens={limit:,}, of one micro-batch each" if alone else "")


def _memory(cost: RunCost, available: int | None) -> str:
    memory = cost.memory
    parts = {"base model": memory.base, "adapters": memory.adapters, "largest step": memory.step}
    parts["data and libraries"] = memory.process
    listed = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items() if size)
    text = f"Peak memory: about {_gigabytes(memory.total)} ({listed})"
    if available is None:
        return text
    return text + f"; {_gigabytes(available)} available" + ("" if memory.total <= available else ": NOT ENOUGH")


def _fitting(forecast: RunForecast, cost: RunCost, available: int) -> str:
    wanted, fit = len(forecast.adapters), num_that_fit(forecast, cost, available, _MOST_ADAPTERS)
    if fit == 0:
        return (
            "Fit at once: none; try activation_checkpointing: selective or full, a smaller max_batch_tokens or "
            "micro_batch_size"
        )
    if fit < wanted:
        return f"Fit at once: {fit:,} of {wanted:,} adapters; set max_concurrent_adapters={fit} or lower"
    room = f"{_MOST_ADAPTERS:,} or more" if fit == _MOST_ADAPTERS else f"about {fit:,}"
    return f"Fit at once: all {wanted:,} adapters (there is room for {room} like the largest of them)"


def _time(cost: RunCost) -> str:
    total = f"Run time: about {format_seconds(cost.step_seconds + cost.eval_seconds)}"
    if not cost.eval_seconds:
        return total
    return total + f" (steps {format_seconds(cost.step_seconds)}, evaluations {format_seconds(cost.eval_seconds)})"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 99.5e9 else f"{size / 1e9:.0f} GB"
