"""A run in which every registered method trains beside all others: it learns, resumes, and is as alone."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from every_method import CONFIGS, METHOD_OF
from resuming import assert_same_run, run_and_die
from tiny_run import new_trainer, quiet_console, run_config

from moe_peft import load_adapter, load_base_model, save_adapter
from moe_peft.config import TrainConfig
from moe_peft.strict import plain
from moe_peft.training.forecast import cost
from moe_peft.training.forecast.plan import print_plan
from moe_peft.training.forecast.work import forecast_run
from moe_peft.training.proof.verify import verify

pytestmark = pytest.mark.usefixtures("no_pictures")
NUM_STEPS = 6


def entry_of(name: str, data: str, held_out: str) -> dict[str, Any]:
    """An adapter of this config, whose micro-batches and evaluations are of its own pace."""
    place = list(CONFIGS).index(name)
    job = {"name": name, "method": METHOD_OF[name], "data": data, "cutoff_len": 128, "lr": 1e-2, "max_steps": NUM_STEPS}
    job |= {"batch_size": 3 + place % 2, "micro_batch_size": (3, 2)[place % 2], "eval_data": held_out}
    return {**job, **plain(CONFIGS[name])}


@pytest.fixture
def new_config(base: Path, data: str, held_out: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    def config(name: str, **changes: Any) -> TrainConfig:
        entries = [entry_of(one, data, held_out) for one in CONFIGS]
        fields = {"save_steps": 4, "max_batch_tokens": 100_000, "max_concurrent_adapters": len(CONFIGS)}
        return run_config(base, tmp_path / name, *entries, **{**fields, **changes})

    return config


def test_all_learn_together_and_a_killed_run_ends_in_the_same_bits(
    new_config: Callable[..., TrainConfig], base: Path, tmp_path: Path
) -> None:
    config = new_config("undisturbed")
    result = new_trainer(config).train()
    assert [adapter.num_steps for adapter in result.adapters] == [NUM_STEPS] * len(CONFIGS)
    for adapter in result.adapters:
        assert adapter.eval_loss_after < adapter.eval_loss_before, adapter.name
    model = load_base_model(base)
    for job in config.adapters:
        trained = tmp_path / "undisturbed" / "adapters" / job.name
        assert load_adapter(model, trained) == job.name
        model.add_adapter("fresh", job.adapter, seed=config.seed)
        save_adapter(model, "fresh", tmp_path / "fresh")
        first, last = ((folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "fresh", trained))
        assert first != last, job.name
        model.remove_adapter("fresh")
        model.remove_adapter(job.name)
    assert run_and_die(new_config("run"), 7)  # behind the checkpoint of the fourth
    assert not run_and_die(new_config("run"), 10**6)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_proof_holds(dtype: str, new_config: Callable[..., TrainConfig]) -> None:
    console = quiet_console()
    is_same = verify(new_config("run", dtype=dtype), 2, console)
    text = console.file.getvalue()
    assert is_same, text
    for name in CONFIGS:
        assert re.search(rf"^{name}, step 2: same$", text, re.M), text
    assert f"all {2 * len(CONFIGS)} comparisons are equal to the bit" in text, text


def test_the_plan_counts_each(new_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "PROBE_SECONDS", 0.01)
    config, console = new_config("run"), quiet_console()
    print_plan(config, console)
    adapters = forecast_run(config).adapters
    model = load_base_model(config.base_model)
    for name, adapter in CONFIGS.items():
        model.add_adapter(name, adapter)
        count = sum(weight.numel() for weight in model.adapter_parameters(name))
        assert adapters[name].num_trainable == count, name
        assert f" {count:,} " in console.file.getvalue(), name
