"""Bad steps are skipped, end in their adapter's failure and cost its neighbours not a bit; patience ends others."""

import dataclasses
import math
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import rows_of
from safetensors.torch import load_file
from tiny_run import adapter_entry, new_trainer, run_config, train
from torch import Tensor

from moe_peft import ModelInput, ModelOutput, Trainer
from moe_peft.config import TrainConfig
from moe_peft.training.errors import UnfinishedError
from moe_peft.training.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("no_pictures")

MIXTURE = {"method": "mixlora", "num_experts": 3}


def spoil(trainer: Trainer, adapter: str, steps: Container[int], what: str) -> None:
    """Let an adapter's loss, or only its gradient, be NaN in the first micro-batch of those of its steps, from 0."""

    def stand_in(_: torch.nn.Module, arguments: tuple[ModelInput], outputs: list[ModelOutput]) -> list[ModelOutput]:
        for i, (config, output) in enumerate(zip(arguments[0].batch_configs_, outputs, strict=True)):
            if config.adapter_name == adapter and config.step in steps and config.micro_batch == 0:
                if what == "loss":
                    outputs[i] = dataclasses.replace(output, loss=output.loss * math.nan)
                elif output.loss.requires_grad:
                    output.loss.register_hook(lambda gradient: gradient * math.nan)
        return outputs

    trainer.model.register_forward_hook(stand_in)


def saved(config: TrainConfig, adapter: str) -> dict[str, Tensor]:
    return load_file(Path(str(config.output_dir)) / "adapters" / adapter / "adapter_model.safetensors")


def own_rows(config: TrainConfig, adapter: str, event: str = "step") -> list[dict[str, Any]]:
    rows = rows_of(Path(str(config.output_dir)))
    return [row for row in rows if row["adapter"] == adapter and row["event"] == event]


def three(base: Path, data: str, held_out: str, output_dir: Path, **bad: Any) -> TrainConfig:
    """``bad`` between two neighbours, whose forwards it shares."""
    entries = [
        adapter_entry("before", data, lora_dropout=0.1, max_steps=6, eval_data=held_out),
        adapter_entry("bad", data, micro_batch_size=2, **{**MIXTURE, "max_steps": 5, **bad}),
        adapter_entry("after", data, max_steps=6, **MIXTURE),
    ]
    return run_config(base, output_dir, *entries)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_is_skipped_and_costs_the_others_not_a_bit(
    what: str, base: Path, data: str, held_out: str, tmp_path: Path
) -> None:
    healthy = three(base, data, held_out, tmp_path / "healthy")
    train(healthy)
    config = three(base, data, held_out, tmp_path / "run")
    trainer = new_trainer(config)
    spoil(trainer, "bad", {1, 3}, what)
    result = trainer.train()
    for name in ("before", "after"):
        for event in ("step", "eval", "experts"):
            assert own_rows(config, name, event) == own_rows(healthy, name, event)
        for key, weight in saved(healthy, name).items():
            assert torch.equal(saved(config, name)[key], weight)
    rows, expected = own_rows(config, "bad"), own_rows(healthy, "bad")
    assert [row.get("skipped_steps") for row in rows] == [None, 1, 1, 2, 2]
    assert ["skipped" in row for row in rows] == [False, True, False, True, False]
    assert [row["grad_norm"] is None for row in rows] == [False, True, False, True, False]
    assert [row["loss"] is None for row in rows] == [what == "loss" and i in (1, 3) for i in range(5)]
    for field in ("step", "epoch", "lr", "num_tokens", "fused_step"):
        assert [row[field] for row in rows] == [row[field] for row in expected]
    assert rows[0] == expected[0]
    assert rows[2]["loss"] != expected[2]["loss"]
    assert {adapter.name: (adapter.status, adapter.skipped_steps) for adapter in result.adapters} == {
        "before": ("done", 0), "bad": ("done", 2), "after": ("done", 0)
    }  # fmt: skip


@pytest.mark.parametrize("max_bad_steps", [1, 3])
def test_so_many_bad_steps_in_a_row_are_a_failure(
    max_bad_steps: int, base: Path, data: str, held_out: str, tmp_path: Path
) -> None:
    bad = {"max_bad_steps": max_bad_steps, "max_steps": 9}
    healthy = three(base, data, held_out, tmp_path / "healthy", **bad)
    train(healthy)
    config = three(base, data, held_out, tmp_path / "run", **bad)
    trainer = new_trainer(config)
    # Never three in a row before the sixth step.
    first = 1 if max_bad_steps == 1 else 3
    spoil(trainer, "bad", {1, 3, 4, 5}, "loss")
    before: list[dict[str, Tensor]] = []
    run = trainer.runs["bad"]
    step = run.optimizer.step

    def keep_and_step() -> None:
        before.append({key: weight.clone() for key, weight in trainer.model.adapter_state("bad").items()})
        step()

    run.optimizer.step = keep_and_step  # type: ignore[method-assign, assignment]
    with pytest.raises(UnfinishedError) as caught:
        trainer.train()
    last = first + max_bad_steps
    good = 0 if max_bad_steps == 1 else 2
    assert str(caught.value) == (
        "adapter 'bad': failed: loss=nan and aux_loss=" + str(caught.value).split("aux_loss=")[1].split(" ")[0]
        + f" must be finite (after optimizer step {last}; the weights of step {good} are kept)"
    )  # fmt: skip
    assert len(own_rows(config, "bad")) == last
    for key, weight in saved(config, "bad").items():
        assert torch.equal(weight, before[-1][key]), "the last weights that gave a finite loss"
    for name in ("before", "after"):
        rows, expected = own_rows(config, name), own_rows(healthy, name)
        shared = [row for row in rows if row["fused_step"] <= own_rows(config, "bad")[-1]["fused_step"]]
        assert shared
        assert shared == expected[: len(shared)]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)


def test_an_end_on_a_bad_step_is_no_good_end(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    entries = [adapter_entry("blind", data), adapter_entry("seeing", data, eval_data=held_out)]
    trainer = new_trainer(run_config(base, tmp_path / "run", *entries))
    for name in ("blind", "seeing"):
        spoil(trainer, name, {2}, "gradient")
    with pytest.raises(UnfinishedError, match=r"^adapter 'blind': failed: gradient norm nan must be finite"):
        trainer.train()
    states = {name: job.state for name, job in trainer.jobs.items()}
    assert states == {"blind": "failed", "seeing": "done"}, "an evaluation shows that the weights are good"


def test_patience_ends_an_adapter_with_its_best_weights(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    changes = {"eval_data": held_out, "eval_steps": 2, "lr_scheduler": "constant"}
    entries = [
        adapter_entry("stops", data, lr=0.2, max_steps=60, patience=3, **changes),
        adapter_entry("goes on", data, lr=0.2, max_steps=60, **changes),
    ]
    entries[1]["name"] = "goes_on"
    config = run_config(base, tmp_path / "run", *entries)
    trainer = new_trainer(config)
    result = trainer.train()
    stopped, other = result.adapters
    losses = [row["eval_loss"] for row in own_rows(config, "stops", "eval")]
    best = losses.index(min(losses))
    assert best > 0
    assert len(losses) == best + 4, "three evaluations without a better one"
    assert all(min(losses[:i]) > min(losses[: i + 3]) for i in range(1, best)), "never before"
    assert stopped.state == "early-stopped"
    assert stopped.reason == (
        f"no better eval_loss in 3 evaluations; the weights of step {2 * best}, the best by eval_loss, are kept"
    )
    assert (stopped.eval_loss_after, stopped.num_steps) == (min(losses), 2 * (best + 3))
    assert (other.state, other.num_steps) == ("done", 60)
    model = trainer.model
    model.add_adapter("again", trainer.jobs["stops"].settings.adapter)
    for key, weight in model.adapter_state("again").items():
        weight.copy_(saved(config, "stops")[key])
    samples = trainer.jobs["stops"].data.eval_set
    assert samples is not None
    loss, _ = evaluate(model, {"again": samples.samples}, 10**6)["again"]
    assert loss == pytest.approx(min(losses), rel=1e-6)


def test_min_delta_asks_for_more(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    changes = {"eval_data": held_out, "eval_steps": 1, "max_steps": 12, "patience": 2}
    entries = [
        adapter_entry("easy", data, **changes),
        adapter_entry("strict", data, min_delta=100.0, **changes),
    ]
    easy, strict = train(run_config(base, tmp_path / "run", *entries)).adapters
    assert easy.num_steps > 2
    assert (strict.state, strict.num_steps, strict.eval_loss_after) == ("early-stopped", 2, strict.eval_loss_before)
