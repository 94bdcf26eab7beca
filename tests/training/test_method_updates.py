"""Methods that change themselves while they train: what is called when, and that kills and faults change nothing."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import assert_same_run, rows_of, run_and_die
from safetensors.torch import load_file
from tiny_run import adapter_entry, new_trainer, quiet_console, run_config, train

from moe_peft import AdaptiveLoraConfig, LoraConfig, Trainer
from moe_peft.config import TrainConfig
from moe_peft.training.adapter_run import AdapterRun
from moe_peft.training.adapter_tensors import restore_tensors, tensors_of
from moe_peft.training.errors import UnfinishedError
from moe_peft.training.forecast import cost
from moe_peft.training.forecast.plan import print_plan
from moe_peft.training.proof.verify import verify

pytestmark = pytest.mark.usefixtures("no_pictures")


def entries_of(data: str, held_out: str) -> dict[str, dict[str, Any]]:
    """Adapters that change at almost every step, with what makes their steps differ."""
    growing = {
        "method": "adaptive_lora",
        "r": 2,
        "max_rank": 8,
        "grow_every": 2,
        "grow_share": 0.5,
        "lora_dropout": 0.1,
    }
    pruned = {"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "max_steps": 7}
    moved = {"method": "sparse_lora", "mask_type": "movement", "prune_start": 0.2, "prune_end": 0.8}
    entries = [
        adapter_entry("grown", data, max_steps=6, micro_batch_size=3, weight_decay=0.1, **growing),
        adapter_entry("sgd", data, max_steps=5, optimizer="sgd", momentum=0.9, **growing),
        adapter_entry("best", data, max_steps=6, eval_data=held_out, eval_steps=1, patience=4, lr=0.1, **growing),
        adapter_entry("pruned", data, micro_batch_size=1, lora_dropout=0.1, **pruned),
        adapter_entry("moved", data, max_steps=5, **moved),
    ]
    for entry in entries:
        if entry["method"] == "adalora":
            del entry["r"]
    return {entry["name"]: entry for entry in entries}


@pytest.fixture
def new_config(base: Path, data: str, held_out: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    def config(folder: str, *names: str, **changes: Any) -> TrainConfig:
        entries = entries_of(data, held_out)
        fields = {"max_concurrent_adapters": 3, "save_steps": 1, "max_batch_tokens": 10**5}
        chosen = [entries[name] for name in names or entries]
        return run_config(base, tmp_path / folder, *chosen, **{**fields, **changes})

    return config


def settings_of(folder: Path, name: str) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "adapters" / name / "adapter_config.json").read_text())
    return settings


def test_a_run_killed_anywhere_ends_in_the_same_bits(new_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(new_config("undisturbed"))
    history = settings_of(tmp_path / "undisturbed", "grown")["growth_history"]
    assert [growth["step"] for growth in history] == [2, 4]
    pattern = settings_of(tmp_path / "undisturbed", "pruned")["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 2 * 14
    for numbers in ((3, 3, 4, 3), (6,)):
        for number in numbers:
            assert run_and_die(new_config("run"), number)
        assert not run_and_die(new_config("run"), 10**6)
        assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("name", ["grown", "pruned", "moved"])
def test_a_member_of_a_sweep_that_waits_off_the_model(
    name: str, base: Path, data: str, held_out: str, tmp_path: Path
) -> None:
    """It goes on as it would have gone on alone, and a kill changes nothing of it."""

    def config(folder: str) -> TrainConfig:
        entry = {**entries_of(data, held_out)[name], "max_steps": 6, "eval_data": held_out}
        entry |= {"lr": [1e-5, 1e-2, 3e-3], "sweep": {"halve_every": 3}}
        return run_config(base, tmp_path / folder, entry, max_concurrent_adapters=1, save_steps=1)

    train(config("undisturbed"))
    rows = rows_of(tmp_path / "undisturbed")
    states = {row["adapter"]: row["state"] for row in rows if row["event"] == "job"}
    waiting = {row["adapter"] for row in rows if row["event"] == "job" and row["state"] == "waiting"}
    best = next(member for member, state in states.items() if state == "done" and member in waiting)
    job = next(job for job in config("x").adapters if job.name == best).to_dict()
    train(run_config(base, tmp_path / "alone", {**job, "sweep": None}, save_steps=None))
    files = [tmp_path / run / "adapters" / best / "adapter_model.safetensors" for run in ("undisturbed", "alone")]
    waited, alone = (load_file(file) for file in files)
    assert waited.keys() == alone.keys()
    assert all(torch.equal(waited[key], alone[key]) for key in waited)
    for number in (5, 10):
        assert run_and_die(config("run"), number)
    assert not run_and_die(config("run"), 10**6)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


class Recorder:
    """Notes the steps behind which it is called, with what it finds there."""

    def __init__(self, run: AdapterRun) -> None:
        self.run = run
        self.inner = run.updates
        self.steps: list[int] = []

    def after_step(self, step: int) -> None:
        """Notes the step, and passes it on."""
        self.steps.append(step)
        gradients = [weight.grad for weight in self.run.parameters]
        assert all(gradient is not None for gradient in gradients)
        assert torch.nn.utils.get_total_norm(gradients) <= 1.001 * self.run.job.max_grad_norm
        if self.inner is not None:
            self.inner.after_step(step)


def spoil(trainer: Trainer, steps: set[int]) -> None:
    """Let the loss be NaN in these of the adapter's steps, from 0."""
    forward = trainer.model.forward

    def spoilt(model_input: Any, **options: Any) -> Any:
        outputs = forward(model_input, **options)
        for config, output in zip(model_input.batch_configs_, outputs, strict=True):
            if config.step in steps and trainer.model.training:
                object.__setattr__(output, "loss", output.loss * math.nan)
        return outputs

    trainer.model.forward = spoilt  # type: ignore[method-assign]


def steps_of(trainer: Trainer) -> Any:
    """Takes a lone adapter's steps; yields its run behind each."""
    fused = trainer.fused_run
    fused.admit()
    (job,) = fused.queue.running
    trainer.model.train()
    run = job.run
    assert run is not None
    while run.is_active:
        if fused.take_step(fused.dispatcher.next_batch()):
            yield run


def test_it_is_called_behind_each_step_that_is_taken(base: Path, data: str, tmp_path: Path) -> None:
    entry = adapter_entry("qa", data, max_steps=6, max_grad_norm=0.01, micro_batch_size=2)
    trainer = new_trainer(run_config(base, tmp_path / "run", entry))
    spoil(trainer, {1, 3})
    steps = steps_of(trainer)
    run = next(steps)
    run.updates = recorder = Recorder(run)
    assert sum(1 for _ in steps) == 5
    assert recorder.steps == [3, 5, 6]


def test_growth_leaves_moments_and_kept_weights_as_they_act(
    new_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """The parameter objects stay; what is old stays to the bit; of what is new the moments are zero, and kept weights
    have what the weights have: live rows of A that can learn, and columns of zeros of B."""
    trainer = new_trainer(new_config("run", "grown"))
    steps = steps_of(trainer)
    run = next(steps)
    objects = [id(weight) for weight in run.parameters]
    run.best_weights = [weight.detach().clone() for weight in run.parameters]
    before = [weight.shape for weight in run.parameters]
    best = [weight.clone() for weight in run.best_weights]
    inner, at_growth = run.updates, {}

    class Before:
        def after_step(self, step: int) -> None:
            at_growth["good"] = [weight.clone() for weight in run.good_weights]
            at_growth["moments"] = [
                {key: value.clone() for key, value in run.optimizer.state[weight].items()} for weight in run.parameters
            ]
            inner.after_step(step)

    run.updates = Before()
    next(steps)
    assert [id(weight) for weight in run.parameters] == objects
    grown = [i for i, weight in enumerate(run.parameters) if weight.shape != before[i]]
    assert len(grown) == len(objects) / 2
    for i, weight in enumerate(run.parameters):
        places = tuple(slice(size) for size in before[i])
        moments = run.optimizer.state[weight]
        kept = {
            "good": (run.good_weights[i], at_growth["good"][i]),
            "best": (run.best_weights[i], best[i]),
            **{key: (moments[key], at_growth["moments"][i][key]) for key in ("exp_avg", "exp_avg_sq")},
        }
        assert torch.equal(moments["step"], at_growth["moments"][i]["step"])
        for what, (now, then) in kept.items():
            assert now.shape == weight.shape, what
            assert torch.equal(now[places], then), what
            if what.startswith("exp_avg") or places[0].stop == len(weight):  # B
                assert now.count_nonzero() == then.count_nonzero(), what
            else:
                new = now[places[0].stop :]
                assert torch.equal(new, weight[places[0].stop :]), what
                assert new.count_nonzero(dim=1).min() > 0, what
    assert sum(1 for _ in steps) == 4  # the optimizer goes on with them


@pytest.mark.parametrize("name", ["grown", "pruned", "moved"])
def test_weights_that_are_kept_have_their_own_masks(
    name: str, base: Path, data: str, held_out: str, tmp_path: Path
) -> None:
    """An adapter that ends on bad steps is saved as it was before the step that ruined it: weights and masks of one."""
    entry = {**entries_of(data, held_out)[name], "max_bad_steps": 1}
    trainer = new_trainer(run_config(base, tmp_path / "run", entry, save_steps=None))
    spoil(trainer, {4})
    kept: dict[str, torch.Tensor] = {}
    update = AdapterRun._update_weights

    def watched(run: AdapterRun, *arguments: Any) -> None:
        kept.clear()
        kept.update({key: tensor.clone() for key, tensor in run.job.adapter.to_saved(run.model, name).items()})
        update(run, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterRun, "_update_weights", watched)
        with pytest.raises(UnfinishedError, match="the weights of step 3 are kept"):
            trainer.train()
    saved = load_file(tmp_path / "run" / "adapters" / name / "adapter_model.safetensors")
    assert saved.keys() == kept.keys()
    for key, tensor in kept.items():
        now, then = saved[key], tensor
        if name == "grown" and now.shape != then.shape:  # it grew by what has no effect
            now = now[tuple(slice(size) for size in then.shape)]
            if "lora_A" in key:
                assert saved[key].count_nonzero(dim=1).min() > 0, "a rank of zeros alone never learns"
            else:
                assert saved[key].count_nonzero() == then.count_nonzero()
        assert torch.equal(now, then), key


def test_the_best_weights_have_their_own_masks(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    """Under a patience, too: pruning that came after them is undone."""
    entry = {**entries_of(data, held_out)["pruned"], "eval_data": held_out, "eval_steps": 1, "patience": 9, "lr": 0.05}
    trainer = new_trainer(run_config(base, tmp_path / "run", entry))
    losses = iter([9.0, 5.0, 4.0, 1.0, 8.0, 8.0, 8.0, 8.0])
    take = AdapterRun.take_evaluation
    seen: list[dict[str, torch.Tensor]] = []

    def fixed(run: AdapterRun, evaluation: Any) -> None:
        seen.append({key: tensor.clone() for key, tensor in run.job.adapter.to_saved(run.model, "pruned").items()})
        object.__setattr__(evaluation, "eval_loss", next(losses))
        take(run, evaluation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterRun, "take_evaluation", fixed)
        trainer.train()
    saved = load_file(tmp_path / "run" / "adapters" / "pruned" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], tensor) for key, tensor in seen[3].items())
    assert any(saved[key].shape != tensor.shape for key, tensor in seen[-1].items())


def test_a_checkpoint_of_other_shapes_is_refused(base: Path, data: str, tmp_path: Path) -> None:
    """Only a method that resizes itself takes them, in as many dimensions and of the same dtype, buffers included."""
    for name, adapter in {"plain": LoraConfig(r=2), "growing": AdaptiveLoraConfig(r=2)}.items():
        entry = adapter_entry(name, data, r=2, method="lora" if name == "plain" else "adaptive_lora")
        trainer = new_trainer(run_config(base, tmp_path / name, entry))
        run = next(steps_of(trainer))
        assert type(run.job.adapter) is type(adapter)
        tensors = {key: tensor.clone() for key, tensor in tensors_of(run).items()}
        larger = {
            key: torch.cat([tensor, tensor]) if key.endswith(".0") and tensor.dim() else tensor
            for key, tensor in tensors.items()
        }
        if name == "plain":
            with pytest.raises(
                ValueError, match=r"checkpoint has \[4, 24\] of torch.float32 where the adapter's weight 0"
            ):
                restore_tensors(run, larger)
            continue
        restore_tensors(run, larger)
        assert run.parameters[0].shape == (4, 24)
        with pytest.raises(ValueError, match=r"has nothing where the adapter's buffer layers\.0\.growth\.steps"):
            restore_tensors(
                run, {key: tensor for key, tensor in tensors.items() if key != "buffer.layers.0.growth.steps"}
            )
        with pytest.raises(ValueError, match=r"has \[2\] of torch.float64 where"):
            restore_tensors(run, {**tensors, "weight.0": torch.zeros(2, dtype=torch.float64)})


def test_settings_that_do_not_fit_the_steps_are_refused_before_anything_trains(
    new_config: Callable[..., TrainConfig], base: Path, data: str, held_out: str, tmp_path: Path
) -> None:
    entry = {**entries_of(data, held_out)["pruned"], "max_steps": 3}
    config = run_config(base, tmp_path / "run", adapter_entry("first", data), entry, max_concurrent_adapters=1)
    with pytest.raises(ValueError, match="tinit=1 plus tfinal=2 must be below the run's 3 optimizer steps"):
        new_trainer(config).train()
    assert not (tmp_path / "run" / "adapters").exists()


def test_the_proof_and_the_plan_go_with_them(
    new_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = quiet_console()
    assert verify(new_config("run", "grown", "pruned", "moved"), 3, console), console.file.getvalue()
    assert "Proved: all 9 comparisons are equal to the bit." in console.file.getvalue()
    monkeypatch.setattr(cost, "PROBE_SECONDS", 0.01)
    print_plan(new_config("run"), console)
    assert all(name in console.file.getvalue() for name in ("grown", "pruned", "moved"))
