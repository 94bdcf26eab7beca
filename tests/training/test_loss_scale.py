"""A float16 base: gradients survive, and an overflow costs its own adapter one step and nobody else anything."""

from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import add_random_adapter, assert_relative, tiny_model
from safetensors.torch import load_file
from tiny_run import adapter_entry, new_trainer, run_config
from torch import Tensor

from moe_peft import LoraConfig, MixLoraConfig, ModelInput, ModelOutput, Trainer
from moe_peft.data.dispatcher import MicroBatch
from moe_peft.data.samples import Sample
from moe_peft.training import loss_scale
from moe_peft.training.errors import TrainingError
from moe_peft.training.folder.metrics import read_metrics
from moe_peft.training.fused_step import run_fused
from moe_peft.training.loss_scale import LossScale

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_the_scale_moves_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    theirs = torch.amp.GradScaler("cpu", init_scale=loss_scale.FIRST, growth_interval=3)
    ours = LossScale()
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for is_good in (True, True, False, True, True, True, True, False, False, *[True] * 7, False):
        theirs.scale(weight.sum())
        weight.grad = torch.tensor([0.0 if is_good else torch.inf])
        theirs.step(optimizer)
        theirs.update()
        if is_good:
            ours.grow()
        else:
            assert ours.back_off()
        assert ours.value == theirs.get_scale()
    assert ours.num_skipped == 4


def test_the_scale_has_a_floor() -> None:
    scale = LossScale(value=2.0)
    assert scale.back_off()
    assert not scale.back_off()
    assert (scale.value, scale.num_skipped) == (1.0, 1)


def gradients(dtype: torch.dtype, share: float, scales: dict[str, float]) -> dict[str, Tensor]:
    """Gradients of two adapters' share of a step, over float16 weights in this dtype."""
    model = tiny_model(dtype=torch.float16).to(dtype).train()
    configs = {"plain": LoraConfig(r=3, lora_dropout=0.2), "mix": MixLoraConfig(r=2, num_experts=3)}
    for name, config in configs.items():
        add_random_adapter(model, name, config, seed=1)
    samples = tuple(Sample(tuple(range(i, i + 9)), tuple(range(i, i + 9))) for i in (1, 20))
    size = {"step_supervised": round(16 / share), "step_tokens": round(18 / share)}
    parts = [MicroBatch(name, 0, 0, True, samples, **size) for name in configs]
    parameters = {name: model.adapter_parameters(name) for name in configs}
    found = {}
    for outcome in run_fused(model, parts, parameters, print, scales):
        assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in outcome.gradients)
        found[outcome.micro_batch.adapter] = torch.cat([part.flatten() for part in outcome.gradients])
    return found


def test_scaled_gradients_are_those_of_a_float32_base() -> None:
    share = 2.0**-16
    truth = gradients(torch.float32, share, {})
    scaled = gradients(torch.float16, share, {"plain": 2.0**16, "mix": 2.0**12})
    unscaled = gradients(torch.float16, share, {})
    for name in truth:
        assert_relative(scaled[name], truth[name], 0.02, name)
        with pytest.raises(AssertionError, match=name):  # what the scale is for
            assert_relative(unscaled[name], truth[name], 0.1, name)
    # Where the scale makes up for the share exactly, the backward is that of a whole step to the bit.
    assert torch.equal(scaled["plain"], gradients(torch.float16, 1.0, {})["plain"] * share)


def test_a_scale_divides_out_exactly_and_touches_nobody_else() -> None:
    plain, scaled = gradients(torch.float32, 1.0, {}), gradients(torch.float32, 1.0, {"mix": 2.0**10})
    assert all(torch.equal(scaled[name], plain[name]) for name in plain)


def half_trainer(base: Path, output_dir: Path, *entries: dict[str, Any], **changes: Any) -> Trainer:
    """A trainer on a float16 base, whose scales start where nothing overflows by itself."""
    trainer = new_trainer(run_config(base, output_dir, *entries, **{"dtype": "float16", **changes}))
    for run in trainer.runs.values():
        if run.loss_scale is not None:
            assert run.loss_scale.value == 65536.0
            run.loss_scale.value = 1024.0
    return trainer


def test_a_run_ends_near_the_float32_run(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float16", "float32"):
        entries = [
            adapter_entry("qa", data, eval_data=held_out, max_steps=12),
            adapter_entry("mix", data, method="mixlora", num_experts=3, eval_data=held_out, max_steps=12),
        ]
        result = half_trainer(base, tmp_path / dtype, *entries, dtype=dtype).train()
        assert all(adapter.skipped_steps == 0 for adapter in result.adapters)
        losses[dtype] = [adapter.eval_loss_after for adapter in result.adapters]
        assert all(adapter.eval_loss_after < 0.8 * adapter.eval_loss_before for adapter in result.adapters)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.02)
    for row in read_metrics(tmp_path / "float16" / "metrics.jsonl"):
        assert row["event"] != "step" or (row["loss_scale"], row["skipped_steps"]) == (1024.0, 0)


def overflow(trainer: Trainer, adapter: str, steps: Container[int]) -> None:
    """Let the first backward of an adapter's steps, from 0, overflow float16; the loss itself stays as it is."""

    def grow(module: torch.nn.Module, arguments: tuple[ModelInput], outputs: list[ModelOutput]) -> None:
        for config, output in zip(arguments[0].batch_configs_, outputs, strict=True):
            is_due = config.adapter_name == adapter and config.step in steps and config.micro_batch == 0
            if is_due and output.loss.requires_grad:
                output.loss.register_hook(lambda gradient: gradient * 2.0**40)

    trainer.model.register_forward_hook(grow)


def rows_of(trainer: Trainer, adapter: str, *events: str) -> list[dict[str, Any]]:
    """The numbers of an adapter's rows, but for what a clock says."""
    rows = read_metrics(Path(str(trainer.config.output_dir)) / "metrics.jsonl")
    own = [row for row in rows if row["adapter"] == adapter and row["event"] in events]
    return [{key: row[key] for key in row if key not in ("seconds", "tokens_per_second")} for row in own]


def saved(trainer: Trainer, adapter: str) -> dict[str, Tensor]:
    return load_file(Path(str(trainer.config.output_dir)) / "adapters" / adapter / "adapter_model.safetensors")


def trainer_of_three(base: Path, data: str, held_out: str, output_dir: Path, **bad: Any) -> Trainer:
    """``bad`` between two neighbours, whose forwards it shares; its steps have two micro-batches, theirs one."""
    mixture = {"method": "mixlora", "num_experts": 3, "max_steps": 5}
    entries = [
        adapter_entry("before", data, lora_dropout=0.1, max_steps=5, eval_data=held_out),
        adapter_entry("bad", data, micro_batch_size=2, **{**mixture, **bad}),
        adapter_entry("after", data, **mixture),
    ]
    return half_trainer(base, output_dir, *entries)


def assert_neighbours_are_equal(trainer: Trainer, healthy: Trainer) -> None:
    for name in ("before", "after"):
        assert rows_of(trainer, name, "step", "eval") == rows_of(healthy, name, "step", "eval")
        for key, weight in saved(healthy, name).items():
            assert torch.equal(saved(trainer, name)[key], weight), f"{name}: {key}"


def test_an_overflow_skips_one_step_of_one_adapter(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    healthy = trainer_of_three(base, data, held_out, tmp_path / "healthy")
    healthy.train()
    trainer = trainer_of_three(base, data, held_out, tmp_path / "overflow")
    overflow(trainer, "bad", {2})
    runs = trainer.runs
    result = trainer.train()
    assert_neighbours_are_equal(trainer, healthy)

    rows, expected = rows_of(trainer, "bad", "step"), rows_of(healthy, "bad", "step")
    assert [row["loss_scale"] for row in rows] == [1024.0, 1024.0, 1024.0, 512.0, 512.0]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
    assert [row["grad_norm"] is None for row in rows] == [False, False, True, False, False]
    # The plan goes on: its steps, batches and rates are those of a run without an overflow.
    for field in ("step", "epoch", "lr", "num_tokens"):
        assert [row[field] for row in rows] == [row[field] for row in expected]
    assert rows[:2] == expected[:2]
    assert rows[2]["loss"] == expected[2]["loss"]
    assert rows[3]["loss"] != expected[3]["loss"]
    ends = {adapter.name: (adapter.status, adapter.num_steps, adapter.skipped_steps) for adapter in result.adapters}
    assert ends == {"before": ("done", 5, 0), "bad": ("done", 5, 1), "after": ("done", 5, 0)}
    updates = {name: run.optimizer.state[run.parameters[0]]["step"].item() for name, run in runs.items()}
    assert updates == {"before": 5, "bad": 4, "after": 5}
    assert "skipped" in trainer.console.file.getvalue()


def test_a_skipped_step_leaves_weights_and_optimizer_alone(base: Path, data: str, tmp_path: Path) -> None:
    weights, moments = [], []
    for num_steps in (2, 4):
        entry = adapter_entry("bad", data, max_steps=num_steps, lr_scheduler="constant")
        trainer = half_trainer(base, tmp_path / str(num_steps), entry)
        overflow(trainer, "bad", {2, 3})
        run = trainer.runs["bad"]
        trainer.train()
        weights.append(saved(trainer, "bad"))
        moments.append([run.optimizer.state[weight] for weight in run.parameters])
    for key, weight in weights[0].items():
        assert torch.equal(weights[1][key], weight), key
    for before, after in zip(*moments, strict=True):
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_overflows_without_end_are_the_adapters_failure(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    trainer = trainer_of_three(base, data, held_out, tmp_path / "run", max_bad_steps=1)
    overflow(trainer, "bad", range(1, 5))
    scale = trainer.runs["bad"].loss_scale
    assert scale is not None
    scale.value = 4.0
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("adapter 'bad': failed: gradient norm ")
    assert "at loss_scale=1, the smallest, must be finite (after optimizer step 4; the weights of step 0" in message
    assert [row["skipped_steps"] for row in rows_of(trainer, "bad", "step")] == [0, 1, 2, 3]
    assert all(weight.isfinite().all() for weight in saved(trainer, "bad").values())
    assert [len(rows_of(trainer, name, "step")) for name in ("before", "after")] == [5, 5]


def test_a_loss_that_is_not_finite_is_still_a_failure(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    trainer = trainer_of_three(base, data, held_out, tmp_path / "run", lr=1e30)
    with pytest.raises(TrainingError, match=r"^adapter 'bad': failed: loss=nan"):
        trainer.train()
    assert [row["skipped_steps"] for row in rows_of(trainer, "bad", "step")] == [0, 1, 2, 3]
    assert {row["loss_scale"] for row in rows_of(trainer, "bad", "step")} == {1024.0}, "it is no overflow"
