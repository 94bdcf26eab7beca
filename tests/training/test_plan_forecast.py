"""What the plan counts is what the run then does."""

import json
from pathlib import Path

import pytest
from tiny_run import adapter_entry, instructions, make_base_folder, make_base_gguf, new_trainer, run_config, write_jsonl

import moe_peft.training.fused_run
from moe_peft.io.base_model import load_base_model, read_base_model_shape
from moe_peft.io.hf_weights import HfCheckpoint
from moe_peft.training.forecast.work import forecast_run

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def config(base, tmp_path):
    """Three adapters of different methods, data, batches and lengths, two at a time."""
    data = [write_jsonl(tmp_path / f"{i}.jsonl", instructions(9 + 4 * i, shift=i)) for i in range(3)]
    entries = [
        adapter_entry("plain", data[0], max_steps=None, num_epochs=2),
        adapter_entry("mixed", data[1], method="mixlora", num_experts=4, top_k=2, micro_batch_size=3, max_steps=5),
        adapter_entry("late", data[2], r=2, target_modules=["q_proj"], eval_data=data[0], eval_steps=2, max_steps=3),
    ]
    return run_config(base, tmp_path / "out", *entries, max_batch_tokens=150, max_concurrent_adapters=2)


@pytest.mark.parametrize("make", [make_base_folder, make_base_gguf])
@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_the_shape_is_that_of_the_loaded_model(make, dtype, tmp_path):
    source = make(tmp_path / "base.gguf")
    shape, model = read_base_model_shape(source, dtype, "cpu"), load_base_model(source, dtype, "cpu")
    assert (shape.config, shape.dtype, shape.device) == (model.config_, model.dtype, model.device)
    empty = shape.empty_model()
    assert {name: (weight.shape, weight.dtype) for name, weight in empty.named_parameters()} == {
        name: (weight.shape, weight.dtype) for name, weight in model.named_parameters()
    }
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}


def test_a_file_that_is_not_what_its_config_says_is_refused(tmp_path):
    folder = make_base_folder(tmp_path / "other")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "intermediate_size": 37}))
    with pytest.raises(ValueError, match="37"):
        read_base_model_shape(folder)


def test_parameters_are_those_of_the_adapters(config):
    forecast = forecast_run(config)
    model = load_base_model(config.base_model)
    assert forecast.num_base == sum(weight.numel() for weight in model.parameters())
    assert forecast.base_bytes == sum(weight.nbytes for weight in model.parameters())
    for job in config.adapters:
        model.add_adapter(job.name, job.adapter)
        found = forecast.adapters[job.name]
        assert found.num_trainable == sum(weight.numel() for weight in model.adapter_parameters(job.name))
        gates = [weight for key, weight in model.adapter_state(job.name).items() if key.endswith("moe_gate.weight")]
        assert found.num_router == sum(weight.numel() for weight in gates)
    assert forecast.adapters["mixed"].num_router > 0


def test_no_weight_is_read(config, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a weight is read")

    monkeypatch.setattr(HfCheckpoint, "copy_into", refuse)
    forecast_run(config)
    with pytest.raises(AssertionError, match="a weight is read"):
        load_base_model(config.base_model)


def test_steps_are_those_of_the_run(config, monkeypatch):
    forwards = []
    run_fused = moe_peft.training.fused_run.run_fused

    def recorded(model, micro_batches, *rest):
        forwards.append(tuple((part.adapter, part.step, part.index) for part in micro_batches))
        return run_fused(model, micro_batches, *rest)

    monkeypatch.setattr(moe_peft.training.fused_run, "run_fused", recorded)
    forecast = forecast_run(config)
    result = new_trainer(config).train()
    assert [step.parts for step in forecast.steps] == forwards
    assert any(len(parts) == 2 for parts in forwards)
    assert len({parts[0][0] for parts in forwards}) > 1

    rows = [json.loads(line) for line in (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()]
    for name, adapter in forecast.adapters.items():
        steps = [row for row in rows if row["event"] == "step" and row["adapter"] == name]
        assert adapter.num_tokens == sum(row["num_tokens"] for row in steps)
        assert adapter.data.plan.num_steps == len(steps)
        evaluations = [row for row in rows if row["event"] == "eval" and row["adapter"] == name]
        assert adapter.num_evaluations == len(evaluations)
    assert forecast.adapters["late"].num_evaluations == 3
    for step in forecast.steps:
        assert step.num_tokens == sum(part.num_tokens for part in forecast.micro_batches(step))


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({}, 4),
        ({"optimizer": "sgd"}, 2),
        ({"optimizer": "sgd", "momentum": 0.9}, 3),
        ({"patience": 2, "eval_steps": 1}, 5),
    ],
    ids=str,
)
def test_what_an_adapter_holds_between_steps(base, tmp_path, changes, copies):
    """Weights, optimizer state, last good and best weights, counted in a run."""
    data = write_jsonl(tmp_path / "data.jsonl", instructions(9))
    entry = adapter_entry("a", data, **({"eval_data": data} if "patience" in changes else {}), **changes)
    config = run_config(base, tmp_path / "out", entry)
    adapter = forecast_run(config).adapters["a"]
    trainer = new_trainer(config)
    run = trainer.runs["a"]
    trainer.train()
    moments = [value for state in run.optimizer.state.values() for value in state.values() if value is not None]
    held = [*run.parameters, *run.good_weights, *(run.best_weights or []), *(x for x in moments if x.dim())]
    assert adapter.state_bytes == sum(tensor.nbytes for tensor in held) == copies * adapter.weight_bytes


def test_what_the_run_would_refuse_is_refused(base, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"instruction": "x " * 400, "output": "y"}])
    config = run_config(base, tmp_path / "out", adapter_entry("a", data, cutoff_len=300))
    with pytest.raises(ValueError, match="adapter 'a': a sample of 300 tokens is longer than the 256"):
        forecast_run(config)
