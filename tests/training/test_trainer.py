"""Whole runs of the trainer: what they accept, report and leave behind."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file
from tiny_run import adapter_entry, instructions, make_base_folder, new_trainer, run_config, train, write_jsonl

from moe_peft import load_adapter, load_base_model
from moe_peft.config import TrainConfig
from moe_peft.training.evaluation import evaluate
from moe_peft.training.folder.metrics import read_metrics

quiet = pytest.mark.usefixtures("no_pictures")

STEP_FIELDS = {
    "event", "adapter", "step", "num_steps", "epoch", "loss", "aux_loss", "lr", "grad_norm", "num_supervised_tokens",
    "num_tokens", "seconds", "tokens_per_second", "fused_step",
}  # fmt: skip


def test_a_run_leaves_everything_it_promises(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    config = run_config(
        base,
        tmp_path / "run",
        adapter_entry("qa", data, eval_data=held_out, max_steps=None, num_epochs=2, batch_size=5),
        adapter_entry("mix", data, method="mixlora", num_experts=5, eval_data=held_out, eval_steps=2, max_steps=5),
        answer_examples=2,
    )
    trainer = new_trainer(config)
    result = trainer.train()
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapters", "checkpoints", "config.yaml", "experts-mix.png", "inbox", "leaderboard.json", "leaderboard.md",
        "loss.png", "metrics.jsonl", "run.lock",
    ]  # fmt: skip
    resolved = dataclasses.replace(config, dtype="float32", device="cpu")
    assert TrainConfig.from_file(folder / "config.yaml") == resolved
    for picture in ("loss.png", "experts-mix.png"):
        pixels = imread(folder / picture)
        assert pixels.ndim == 3
        assert pixels[..., :3].std() > 0.01, f"{picture} is blank"

    rows = read_metrics(folder / "metrics.jsonl")
    steps = {name: [row for row in rows if row["event"] == "step" and row["adapter"] == name] for name in trainer.jobs}
    assert [row["step"] for row in steps["qa"]] == list(range(1, 9))
    assert [row["epoch"] for row in steps["qa"]] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert [row["step"] for row in steps["mix"]] == list(range(1, 6))
    for row in [*steps["qa"], *steps["mix"]]:
        assert row.keys() == STEP_FIELDS
        assert row["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["num_supervised_tokens"] / row["seconds"])
        assert row["num_steps"] == {"qa": 8, "mix": 5}[row["adapter"]]
        assert 0 < row["num_supervised_tokens"] < row["num_tokens"]
        assert (row["aux_loss"] > 0) is (row["adapter"] == "mix")
    evals = {name: [row for row in rows if row["event"] == "eval" and row["adapter"] == name] for name in trainer.jobs}
    assert [row["step"] for row in evals["qa"]] == [0, 8]
    assert [row["step"] for row in evals["mix"]] == [0, 2, 4, 5]

    assert result.run_dir == folder
    for adapter in result.adapters:
        own = evals[adapter.name]
        assert (adapter.status, adapter.saved_to) == ("done", folder / "adapters" / adapter.name)
        assert (adapter.eval_loss_before, adapter.eval_loss_after) == (own[0]["eval_loss"], own[-1]["eval_loss"])
        assert adapter.eval_loss_after < adapter.eval_loss_before
        assert [example.expected for example in adapter.examples] == [
            record["output"] for record in instructions(2, shift=100)
        ]
    text = trainer.console.file.getvalue()
    for words in (
        "16,032 frozen parameters, float32 on cpu",
        "Held-out answers of mix",
        str(folder / "adapters" / "qa"),
    ):
        assert words in text


@quiet
def test_what_was_saved_is_what_was_trained(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    entries = [
        adapter_entry("qa", data, eval_data=held_out, lora_dropout=0.3),
        adapter_entry("mix", data, method="mixlora", num_experts=3, eval_data=held_out, router_jitter_noise=0.3),
    ]
    trainer = new_trainer(run_config(base, tmp_path / "run", *entries, max_batch_tokens=100))
    result = trainer.train()
    model = load_base_model(base)
    for adapter in result.adapters:
        load_adapter(model, adapter.saved_to, adapter.name)
        samples = trainer.jobs[adapter.name].data.eval_set.samples
        assert evaluate(model, {adapter.name: samples}, 10**6)[adapter.name][0] == pytest.approx(
            adapter.eval_loss_after, rel=1e-6
        )


@quiet
def test_the_expert_load_counts_every_routed_token(base: Path, data: str, tmp_path: Path) -> None:
    entry = adapter_entry("mix", data, method="mixlora", num_experts=5, top_k=2, micro_batch_size=3, max_steps=23)
    trainer = new_trainer(run_config(base, tmp_path / "run", entry))
    trainer.train()
    counts = torch.tensor(trainer.jobs["mix"].record.expert_counts)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    num_tokens = sum(row["num_tokens"] for row in rows if row["event"] == "step")
    assert counts.shape == (2, 5)
    assert counts.sum(dim=1).tolist() == [2 * num_tokens] * 2
    # A row every ten steps and one at the end, each with what has come since the one before.
    of_rows = [row for row in rows if row["event"] == "experts"]
    assert [row["step"] for row in of_rows] == [10, 20, 23]
    assert sum(torch.tensor(row["counts"]) for row in of_rows).tolist() == counts.tolist()


@quiet
def test_records_of_every_kind_train(base: Path, tmp_path: Path) -> None:
    kinds = {
        "text": [{"text": f"once upon a time {i}"} for i in range(6)],
        "chat": [
            {
                "messages": [
                    {"role": "system", "content": "Be short."},
                    {"role": "user", "content": f"say {i}"},
                    {"role": "assistant", "content": f"{i}"},
                    {"role": "user", "content": "again"},
                    {"role": "assistant", "content": f"{i}!"},
                ]
            }
            for i in range(6)
        ],
        "instruction": instructions(6),
    }
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", records) for name, records in kinds.items()}
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(kinds["instruction"], indent=1))
    entries = [adapter_entry(name, file, eval_data=file) for name, file in files.items()]
    entries += [adapter_entry(f"by_{template}", str(listed), template=template) for template in ("alpaca", "moe_peft")]
    entries.append(adapter_entry("as_chat", str(listed), template="chat", eval_data=str(listed)))
    trainer = new_trainer(run_config(base, tmp_path / "run", *entries, answer_examples=1))
    result = trainer.train()
    assert [adapter.status for adapter in result.adapters] == ["done"] * 6
    answered = {adapter.name: len(adapter.examples) for adapter in result.adapters}
    assert answered == {"text": 0, "chat": 1, "instruction": 1, "by_alpaca": 0, "by_moe_peft": 0, "as_chat": 1}
    supervised = {name: job.data.train_set.num_supervised_tokens for name, job in trainer.jobs.items()}
    # A text is learnt whole, a chat's two answers and their ends only.
    text = trainer.jobs["text"].data.train_set
    assert supervised["text"] == text.num_tokens - len(text.samples)
    decode = trainer.tokenizer.decode
    chat = trainer.jobs["chat"].data.train_set.samples[3]
    learnt = [token for token in chat.labels if token != -100]
    assert decode(learnt, skip_special_tokens=False) == "3</s>3!</s>"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@quiet
def test_the_base_may_be_of_any_dtype_and_adapters_are_float32_at_least(
    dtype: str, base: Path, data: str, held_out: str, tmp_path: Path
) -> None:
    entries = [
        adapter_entry("qa", data, eval_data=held_out, max_steps=8),
        adapter_entry("mix", data, method="mixlora", num_experts=3, eval_data=held_out, max_steps=8),
    ]
    trainer = new_trainer(run_config(base, tmp_path / "run", *entries, dtype=dtype))
    wide = torch.float64 if dtype == "float64" else torch.float32
    frozen = {name: weight.clone() for name, weight in trainer.model.named_parameters() if not weight.requires_grad}
    assert {weight.dtype for weight in frozen.values()} == {getattr(torch, dtype)}
    runs = trainer.runs
    result = trainer.train()
    for adapter in result.adapters:
        assert adapter.eval_loss_after < 0.9 * adapter.eval_loss_before
        saved = load_file(adapter.saved_to / "adapter_model.safetensors")
        assert {weight.dtype for weight in saved.values()} == {wide}
        for weight in runs[adapter.name].parameters:
            assert weight.dtype == wide
            assert all(
                state.dtype == wide
                for key, state in runs[adapter.name].optimizer.state[weight].items()
                if key != "step"
            )
    for name, weight in trainer.model.named_parameters():
        if name in frozen:
            assert torch.equal(weight, frozen[name]), f"{name} is frozen"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_precision_base_on_a_cpu_gets_a_warning(dtype: str, base: Path, data: str, tmp_path: Path) -> None:
    trainer = new_trainer(run_config(base, tmp_path / "run", adapter_entry("qa", data), dtype=dtype))
    warning = "Warning: CPUs multiply float16 matrices very slowly"
    assert (warning in trainer.console.file.getvalue()) is (dtype == "float16")


@pytest.mark.parametrize("setting", ["none", "full", "selective"])
@quiet
def test_activation_checkpointing_changes_no_bit(setting: str, base: Path, data: str, tmp_path: Path) -> None:
    entries = [
        adapter_entry("qa", data, lora_dropout=0.2),
        adapter_entry("mix", data, method="mixlora", num_experts=3, lora_dropout=0.2, router_jitter_noise=0.2),
    ]
    results = {}
    for name, changes in (("kept", {}), ("again", {"activation_checkpointing": setting})):
        trainer = new_trainer(run_config(base, tmp_path / name, *entries, **changes))
        assert trainer.model.activation_checkpointing_ == changes.get("activation_checkpointing", "none")
        trainer.train()
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        clockless = [{key: row[key] for key in row if key not in ("seconds", "tokens_per_second")} for row in rows]
        files = [tmp_path / name / "adapters" / adapter / "adapter_model.safetensors" for adapter in trainer.jobs]
        results[name] = clockless, [file.read_bytes() for file in files]
    assert results["again"] == results["kept"]


def test_a_warmup_longer_than_the_training_is_refused(base: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter 'qa': warmup_steps=3 must be below its 3 steps"):
        new_trainer(run_config(base, tmp_path / "run", adapter_entry("qa", data, warmup_steps=3, max_steps=3)))


def test_an_auto_dtype_takes_the_checkpoints(data: str, tmp_path: Path) -> None:
    base = make_base_folder(tmp_path / "base", dtype=torch.float16)
    trainer = new_trainer(run_config(base, tmp_path / "run", adapter_entry("qa", data)))
    assert trainer.model.dtype == torch.float32, "float16 is not native to a CPU"
    assert train(dataclasses.replace(trainer.config)).adapters[0].status == "done"


@quiet
def test_overlong_records_and_cut_prompts_are_counted(base: Path, tmp_path: Path) -> None:
    records = [
        {"instruction": "short", "output": "yes"},
        {"instruction": "long " * 30, "output": "no"},
        {"instruction": "hopeless", "output": "word " * 60},
    ]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    config = run_config(base, tmp_path / "run", adapter_entry("qa", data, cutoff_len=40, overlong="skip"))
    trainer = new_trainer(config)
    assert len(trainer.jobs["qa"].data.train_set.samples) == 2
    trainer.train()
    (row,) = [
        line.split() for line in trainer.console.file.getvalue().splitlines() if line.split()[:2] == ["qa", "lora"]
    ]
    assert row[-4:] == ["2", "1", "1", "3"], "samples, truncated, skipped, steps"
    with pytest.raises(ValueError, match=r"adapter 'qa': .*too long for cutoff_len=40[^\n]*\n  line 3: "):
        new_trainer(run_config(base, tmp_path / "other", adapter_entry("qa", data, cutoff_len=40)))


def test_data_that_does_not_fit_the_base_is_refused_before_anything_is_written(data: str, tmp_path: Path) -> None:
    base = make_base_folder(tmp_path / "base", max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"a sample of \d+ tokens is longer than the 16 .*max_position_embeddings=16"):
        new_trainer(run_config(base, tmp_path / "run", adapter_entry("qa", data)))
    other = make_base_folder(tmp_path / "other", vocab_size=100)
    with pytest.raises(ValueError, match=r"the tokenizer gives token \d+, but the base model's vocab_size=100"):
        new_trainer(run_config(other, tmp_path / "run", adapter_entry("qa", data)))
    assert not (tmp_path / "run").exists()


@quiet
def test_the_summary_counts_parameters(base: Path, data: str, tmp_path: Path) -> None:
    entries = [
        adapter_entry("qa", data, r=3, target_modules=["q_proj"]),
        adapter_entry("mix", data, method="mixlora", r=2, num_experts=4, target_modules=["up_proj"]),
    ]
    trainer = new_trainer(run_config(base, tmp_path / "run", *entries))
    trainer.train()
    table = trainer.console.file.getvalue()
    num_qa = 2 * 3 * (24 + 24)
    num_mix = 2 * (4 * 24 + 4 * 2 * (24 + 36))
    for name, count in (("qa", num_qa), ("mix", num_mix)):
        row = next(line for line in table.splitlines() if line.split()[:1] == [name])
        assert f" {count:,} " in row
        assert f" {100 * count / 16032:.3g}% " in row
        assert f" {16032 / count:.1f}× " in row
