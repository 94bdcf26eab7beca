"""Runs of adapters with virtual tokens: what a step's loss is a mean over, what is counted, resume, plan and proof."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from builders import assert_close
from hf_twin import ExactRotary
from resuming import adapters_of, assert_same_run, run_and_die
from safetensors.torch import load_file
from tiny_run import adapter_entry, instructions, make_base_folder, new_trainer, quiet_console, run_config, train
from tiny_run import write_jsonl as write

from moe_peft.config import TrainConfig
from moe_peft.data.dispatcher import Dispatcher, StepPlan
from moe_peft.data.samples import Sample
from moe_peft.training.evaluation import evaluate
from moe_peft.training.folder.metrics import read_metrics
from moe_peft.training.forecast import probe as probe_module
from moe_peft.training.forecast.probe import Probe
from moe_peft.training.forecast.work import forecast_run
from moe_peft.training.proof.verify import verify

pytestmark = pytest.mark.usefixtures("no_pictures")

LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6}
METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 5},
    "p_tuning": {"num_virtual_tokens": 4, **LSTM},
    "prefix_tuning": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 6},
}


def entry(name: str, data: str, method: str, **changes: Any) -> dict[str, Any]:
    found = adapter_entry(name, data, method=method, **{**METHODS.get(method, {}), **changes})
    del found["r"]
    return found


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Records that supervise every token, the first one too."""
    return write(tmp_path / "texts.jsonl", [{"text": f"{'ab' * (1 + i % 4)} {i}"} for i in range(14)])


def twin_of(trainer: Any, method: str) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """transformers and PEFT with the weights that the trainer begins with, in float64; and those by our names."""
    hf = transformers.LlamaForCausalLM.from_pretrained(trainer.config.base_model, dtype=torch.float64)
    hf.model.rotary_emb = ExactRotary(10000.0, hf.config.hidden_size // hf.config.num_attention_heads)
    configs = {
        "prompt_tuning": peft.PromptTuningConfig,
        "p_tuning": peft.PromptEncoderConfig,
        "prefix_tuning": peft.PrefixTuningConfig,
    }
    twin = peft.get_peft_model(hf, configs[method](task_type="CAUSAL_LM", **METHODS[method])).double().eval()
    weights = dict(twin.prompt_encoder["default"].named_parameters())
    if len(weights) == 1:
        weights = {"prompt_embeddings": weights["embedding.weight"]}
    state = trainer.model.adapter_state("qa")
    assert state.keys() == weights.keys()
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(state[key])
    return twin, weights


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_textbook_loop_on_peft(method: str, base: Path, texts: str, tmp_path: Path) -> None:
    """Every token of a step counts once, the first ones too where a virtual token predicts them; in micro-batches."""
    settings = {"batch_size": 7, "micro_batch_size": 3, "max_steps": 4, "lr_scheduler": "constant"}
    own = entry("qa", texts, method, **settings, optimizer="sgd", momentum=0.9, lr=0.5, max_grad_norm=0.1)
    trainer = new_trainer(run_config(base, tmp_path / "run", own, dtype="float64"))
    twin, weights = twin_of(trainer, method)
    optimizer = torch.optim.SGD(weights.values(), lr=0.5, momentum=0.9)
    plan, expected = trainer.jobs["qa"].data.plan, []
    virtual = METHODS[method]["num_virtual_tokens"] if method != "prefix_tuning" else 0
    for step in range(4):
        samples = [sample for part in plan.micro_batches(step) for sample in part.samples]
        assert all(label != -100 for sample in samples for label in sample.labels)
        count = sum(len(sample.labels) - (not virtual) for sample in samples)
        outputs = [
            twin(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])) for sample in samples
        ]
        loss = sum(
            output.loss.double() * (len(sample.labels) - (not virtual))
            for sample, output in zip(samples, outputs, strict=True)
        )
        loss = loss / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 0.1)
        num_tokens = sum(len(sample.input_ids) + virtual for sample in samples)
        expected.append((loss.item(), norm.item(), count, num_tokens))
        optimizer.step()
        optimizer.zero_grad()
    assert any(norm > 0.1 for _, norm, _, _ in expected), "the test must clip something"
    learnt: dict[str, torch.Tensor] = {}
    remove = trainer.model.remove_adapter
    trainer.model.remove_adapter = lambda name: (  # type: ignore[method-assign]
        learnt.update({key: value.clone() for key, value in trainer.model.adapter_state(name).items()}),
        remove(name),
    )
    trainer.train()
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["event"] == "step"]
    for row, (loss, norm, count, num_tokens) in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert (row["num_supervised_tokens"], row["num_tokens"]) == (count, num_tokens)
    for key, weight in weights.items():
        assert_close(learnt[key], weight, 1e-4, key)
    saved = load_file(tmp_path / "run" / "adapters" / "qa" / "adapter_model.safetensors")
    assert list(saved) == ["prompt_embeddings"]
    assert_close(saved["prompt_embeddings"], twin.get_prompt_embedding_to_save("default"), 1e-4, "embeddings")


def test_a_step_counts_what_is_predicted_and_what_costs() -> None:
    """A first token's label counts only behind a virtual token, and tokens of a prefix are none."""
    samples = [Sample((1, 2, 3), (1, 2, 3)), Sample((4, 5), (-100, 5))]

    def plan(inserted: int) -> StepPlan:
        settings = {"batch_size": 2, "micro_batch_size": 1, "num_epochs": 1, "max_steps": None, "seed": 0}
        return StepPlan("qa", samples, **settings, inserted_tokens=inserted)

    for inserted, supervised, tokens in ((0, 3, 5), (4, 4, 13)):
        parts = plan(inserted).micro_batches(0)
        assert {part.step_supervised for part in parts} == {supervised}
        assert {part.step_tokens for part in parts} == {tokens}
        assert sum(part.num_tokens for part in parts) == tokens
    # 7 tokens fit two samples of 2 and 3 without virtual tokens, and one with them.
    for inserted, shared in ((0, 2), (4, 1)):
        plans = {name: plan(inserted) for name in ("a", "b")}
        assert len(Dispatcher(plans, 7).next_batch()) == shared


def test_an_evaluation_is_the_mean_over_all_predicted_tokens(base: Path, texts: str, tmp_path: Path) -> None:
    entries = [entry(method, texts, method) for method in METHODS]
    trainer = new_trainer(run_config(base, tmp_path / "run", *entries, dtype="float64"))
    sets = {name: run.train_set.samples for name, run in trainer.runs.items()}
    sizes: list[int] = []
    trainer.model.layers[0].register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].shape[0]))
    found = evaluate(trainer.model, sets, 40)
    assert max(sizes) <= 40
    assert len(sizes) > 4
    for name, samples in sets.items():
        losses = [evaluate(trainer.model, {name: [sample]}, 40)[name] for sample in samples]
        count = sum(number for _, number in losses)
        assert count == sum(len(sample.labels) - (name == "prefix_tuning") for sample in samples)
        assert found[name] == (pytest.approx(sum(loss * number for loss, number in losses) / count), count)


@pytest.fixture
def new_config(base: Path, data: str, held_out: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Adapters of every kind with all the randomness they have, a text's tokens, and neighbours without."""

    def config(name: str, **changes: Any) -> TrainConfig:
        text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Repeat the task"}
        entries = [
            entry("text", data, "prompt_tuning", **text, max_steps=3, eval_data=held_out),
            entry("encoder", data, "p_tuning", encoder_dropout=0.3, micro_batch_size=2, max_steps=4),
            entry("prefix", data, "prefix_tuning", eval_data=held_out, eval_steps=2, max_steps=5),
            adapter_entry("low", data, lora_dropout=0.1, max_steps=3),
            entry("free", data, "prefix_tuning", prefix_projection=False, encoder_hidden_size=None, max_steps=2),
        ]
        fields = {"max_concurrent_adapters": 3, "save_steps": 2, "max_batch_tokens": 300}
        return run_config(base, tmp_path / name, *entries, **{**fields, **changes})

    return config


def test_killed_and_resumed_it_ends_in_the_same_bits(new_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(new_config("whole"))
    for number in (2, 5, 8):
        assert run_and_die(new_config(f"killed at {number}"), number)
        train(new_config(f"killed at {number}"))
        assert_same_run(tmp_path / f"killed at {number}", tmp_path / "whole")
    assert len(adapters_of(tmp_path / "whole")) == 10


def test_the_plan_counts_what_the_run_counts(new_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    forecast = forecast_run(new_config("run"))
    trainer = new_trainer(new_config("run"))
    for name, run in trainer.runs.items():
        assert forecast.adapters[name].num_trainable == sum(weight.numel() for weight in run.parameters)
    result = trainer.train()
    rows = [json.loads(line) for line in (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()]
    for name, adapter in forecast.adapters.items():
        steps = [row for row in rows if row["event"] == "step" and row["adapter"] == name]
        assert adapter.num_tokens == sum(row["num_tokens"] for row in steps)
    for step in forecast.steps:
        assert step.num_tokens == sum(part.num_tokens for part in forecast.micro_batches(step))
        assert len(step.parts) == 1 or step.num_tokens <= 300


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_proof_holds(dtype: str, new_config: Callable[..., TrainConfig]) -> None:
    console = quiet_console()
    assert verify(new_config("run", dtype=dtype), 2, console), console.file.getvalue()


@pytest.mark.parametrize("mode", ["none", "full"])
def test_memory_of_three_layers_extends_to_all(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where weights lie beside the layers: those of an encoder once, those of a prefix a layer each."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": 512}
    base = make_base_folder(tmp_path / "base", num_hidden_layers=9, **sizes)
    data = write(tmp_path / "data.jsonl", instructions(24))
    entries = [
        entry("wide", data, "p_tuning", encoder_hidden_size=400, batch_size=6),
        entry("prefix", data, "prefix_tuning", encoder_hidden_size=60, batch_size=6),
        entry("prompt", data, "prompt_tuning", batch_size=6),
    ]
    forecast = forecast_run(run_config(base, tmp_path / "out", *entries, activation_checkpointing=mode))
    micro_batches = forecast.micro_batches(forecast.steps[0])
    assert len(micro_batches) == 3
    estimate = Probe(forecast.shape, forecast.adapters, mode).memory_of_step(micro_batches)
    monkeypatch.setattr(probe_module, "_LAYERS", 9)
    truth = Probe(forecast.shape, forecast.adapters, mode).memory_of_step(micro_batches)
    assert estimate == pytest.approx(truth, rel=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_samples_that_leave_no_room_for_them_are_refused(method: str, base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"instruction": "x " * 400, "output": "y"}])
    count = METHODS[method]["num_virtual_tokens"]
    for cutoff_len in (256 - count, 257 - count):
        config = run_config(base, tmp_path / str(cutoff_len), entry("a", data, method, cutoff_len=cutoff_len))
        if cutoff_len + count == 256:
            forecast_run(config)
            new_trainer(config)
            continue
        message = (
            f"adapter 'a': a sample of {cutoff_len} tokens and {count} virtual ones before it is longer than the 256"
        )
        for refuse in (forecast_run, new_trainer):
            with pytest.raises(ValueError, match=message):
                refuse(config)


def test_answers_at_the_end_leave_room_for_them(base: Path, held_out: str, tmp_path: Path) -> None:
    result = train(
        run_config(
            base,
            tmp_path / "run",
            entry("a", held_out, "prompt_tuning", num_virtual_tokens=220, eval_data=held_out, max_steps=1),
            entry("b", held_out, "prefix_tuning", num_virtual_tokens=220, eval_data=held_out, max_steps=1),
            answer_examples=1,
        )
    )
    assert [len(adapter.examples) for adapter in result.adapters] == [1, 1]
