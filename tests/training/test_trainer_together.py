"""Training beside others equals training alone, and one adapter's ruin stays its own."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import assert_close
from safetensors.torch import load_file
from tiny_run import adapter_entry, instructions, new_trainer, run_config, write_jsonl
from torch import Tensor

from moe_peft import Trainer
from moe_peft.config import TrainConfig
from moe_peft.training.errors import TrainingError
from moe_peft.training.folder.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("no_pictures")

OTHER_FIELDS = ("event", "adapter", "seconds", "tokens_per_second", "fused_step")


def rows_of(config: TrainConfig, adapter: str, event: str = "step") -> list[dict]:
    """The numbers of an adapter's rows, but for what a clock says."""
    rows = read_metrics(Path(str(config.output_dir)) / "metrics.jsonl")
    own = [row for row in rows if row["event"] == event and row["adapter"] == adapter]
    return [{key: value for key, value in row.items() if key not in OTHER_FIELDS} for row in own]


def saved_weights(config: TrainConfig, adapter: str) -> dict[str, Tensor]:
    return load_file(Path(str(config.output_dir)) / "adapters" / adapter / "adapter_model.safetensors")


def entries_of(data: str, other: str, held_out: str) -> list[dict]:
    """Four adapters of different kinds, with noise, batches, lengths and paces of their own."""
    return [
        adapter_entry("small", data, r=2, lora_dropout=0.2, batch_size=3, max_steps=7, eval_data=held_out),
        adapter_entry("large", other, r=9, batch_size=2, max_steps=4, eval_data=held_out, eval_steps=2),
        adapter_entry(
            "mix",
            data,
            method="mixlora",
            num_experts=4,
            lora_dropout=0.1,
            router_jitter_noise=0.1,
            batch_size=5,
            micro_batch_size=2,
            max_steps=5,
        ),
        adapter_entry(
            "down",
            other,
            method="mixlora",
            num_experts=3,
            top_k=1,
            target_modules=["down_proj", "q_proj"],
            router_z_loss_coef=1e-2,
            max_steps=6,
            weight_decay=0.1,
        ),
    ]


@pytest.mark.parametrize(
    ("dtype", "optimizer", "tolerance"),
    # AdamW divides by the gradient's own size, which turns a rounding error of a tiny gradient into a whole step:
    # float64 shows that nothing but rounding differs.
    [("float32", "sgd", 1e-5), ("float32", "adamw", 1e-4), ("float64", "adamw", 1e-9)],
)
@pytest.mark.parametrize("budget", [150, 4096])
def test_training_together_equals_training_alone(
    dtype: str, optimizer: str, tolerance: float, budget: int, base: Path, data: str, held_out: str, tmp_path: Path
) -> None:
    other = write_jsonl(
        tmp_path / "long.jsonl", [{**record, "input": "long " * (5 * i)} for i, record in enumerate(instructions(8))]
    )
    entries = [{**entry, "optimizer": optimizer} for entry in entries_of(data, other, held_out)]
    together = run_config(base, tmp_path / "together", *entries, dtype=dtype, max_batch_tokens=budget)
    new_trainer(together).train()
    for entry in entries:
        name = entry["name"]
        alone = run_config(base, tmp_path / name, entry, dtype=dtype, max_batch_tokens=budget)
        new_trainer(alone).train()
        for event in ("step", "eval"):
            pairs = zip(rows_of(together, name, event), rows_of(alone, name, event), strict=True)
            for row, expected in pairs:
                assert row == pytest.approx(expected, rel=tolerance, abs=1e-9), name
        assert len(rows_of(alone, name)) == entry["max_steps"]
        for key, weight in saved_weights(alone, name).items():
            assert_close(saved_weights(together, name)[key], weight, tolerance, f"{name}: {key}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_config_gives_the_same_bits(dtype: str, base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    configs = []
    for name in ("first", "second"):
        entries = entries_of(data, data, held_out)
        config = run_config(base, tmp_path / name, *entries, dtype=dtype, max_batch_tokens=300)
        torch.manual_seed(len(configs))  # whatever the global generator has been through
        new_trainer(config).train()
        configs.append(config)
    for name in ("small", "large", "mix", "down"):
        for event in ("step", "eval"):
            assert rows_of(configs[0], name, event) == rows_of(configs[1], name, event)
        files = [Path(str(config.output_dir)) / "adapters" / name for config in configs]
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (files[0] / file).read_bytes() == (files[1] / file).read_bytes()


def test_the_seed_changes_a_run(base: Path, data: str, tmp_path: Path) -> None:
    losses = []
    for name, seeds in (("default", {}), ("run", {"seed": 1}), ("own", {"seed": 5})):
        entry = adapter_entry("qa", data, **({"seed": 1} if name == "own" else {}))
        config = run_config(base, tmp_path / name, entry, **seeds)
        new_trainer(config).train()
        losses.append([row["loss"] for row in rows_of(config, "qa")])
    assert losses[0] != losses[1]
    assert losses[1] == losses[2], "the adapter's own seed wins over the run's"


def after_step(trainer: Trainer, adapter: str, step: int, action: Callable[[], object]) -> list[dict[str, Tensor]]:
    """Have ``action`` done after an adapter's optimizer step, from 1; returns a list of its weights before each."""
    run = trainer.runs[adapter]
    optimizer_step, before = run.optimizer.step, []

    def stand_in() -> None:
        before.append({key: weight.clone() for key, weight in trainer.model.adapter_state(adapter).items()})
        optimizer_step()
        if len(before) == step:
            action()

    run.optimizer.step = stand_in  # type: ignore[method-assign, assignment]
    return before


def plant(trainer: Trainer, adapter: str, key: str, value: float) -> None:
    """Put one bad value into the one weight whose name ends with ``key``."""
    name = next(name for name in trainer.model.adapter_state(adapter) if name.endswith(key))
    trainer.model.adapter_state(adapter)[name].view(-1)[0] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("1.mlp.moe_gate.weight", math.nan),
        ("0.self_attn.q_proj.lora_A.weight", math.inf),
        ("0.mlp.down_proj.experts.2.lora_B.weight", math.nan),
        ("1.mlp.up_proj.experts.0.lora_A.weight", -math.inf),
    ],
)
def test_an_adapter_that_breaks_ends_with_its_last_good_weights(
    key: str, value: float, base: Path, data: str, held_out: str, tmp_path: Path
) -> None:
    def config(name: str, budget: int) -> TrainConfig:
        entries = [
            adapter_entry("before", data, max_steps=6, lora_dropout=0.1),
            adapter_entry(
                "bad", data, method="mixlora", num_experts=3, top_k=3, max_steps=6, eval_data=held_out, max_bad_steps=1
            ),
            adapter_entry("after", data, method="mixlora", num_experts=3, max_steps=6, eval_data=held_out),
        ]
        return run_config(base, tmp_path / name, *entries, max_batch_tokens=budget)

    for budget in (4096, 1):  # in one forward with its neighbours, and each alone
        healthy, broken = config(f"healthy {budget}", budget), config(f"broken {budget}", budget)
        new_trainer(healthy).train()
        trainer = new_trainer(broken)
        before = after_step(trainer, "bad", 3, lambda trainer=trainer: plant(trainer, "bad", key, value))
        with pytest.raises(TrainingError) as caught:
            trainer.train()
        message = str(caught.value)
        assert message.startswith("adapter 'bad': ")
        assert "must be finite (after optimizer step 4; the weights of step 2 are kept)" in message
        assert trainer.jobs["bad"].record.steps_taken == 4
        # Step 3's weights are what broke: those before it gave the last finite loss.
        saved = saved_weights(broken, "bad")
        assert all(torch.equal(saved[name], weight) for name, weight in before[2].items())
        assert any((saved[name] != weight).any() for name, weight in before[1].items())
        for name in ("before", "after"):
            rows, expected = rows_of(broken, name), rows_of(healthy, name)
            # To the bit as long as the forwards hold the same tokens, the one with the NaN in it included.
            same = 6 if budget == 1 else 4
            assert rows[:same] == expected[:same]
            assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
            for key_, weight in saved_weights(healthy, name).items():
                if budget == 1:
                    assert torch.equal(saved_weights(broken, name)[key_], weight)
                assert_close(saved_weights(broken, name)[key_], weight, 1e-3, key_)
        text = trainer.console.file.getvalue()
        assert "failed: " in text
        assert all(f"{name}: saved to" in text for name in ("before", "bad", "after"))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"lr": 1e30}, "loss=nan"),
        ({"lr": 1e30, "max_steps": 1}, "the norm of the weights"),
        ({"lr": 1e30, "max_steps": 1, "eval_data": "held_out"}, "eval_loss=nan"),
        ({"lr": 1e39, "max_steps": 1}, "the norm of the weights"),
        ({"lr": 1e15, "optimizer": "sgd", "max_grad_norm": None, "method": "mixlora"}, "must be finite"),
    ],
    ids=["next loss", "last step", "last evaluation", "infinite weights", "sgd"],
)
def test_a_learning_rate_beyond_reason(
    changes: dict, what: str, base: Path, data: str, held_out: str, tmp_path: Path
) -> None:
    if "eval_data" in changes:
        changes = {**changes, "eval_data": held_out}
    config = run_config(base, tmp_path / "run", adapter_entry("qa", data, **changes), adapter_entry("good", data))
    with pytest.raises(TrainingError, match=r"^adapter 'qa': .*the weights of step 0 are kept") as caught:
        new_trainer(config).train()
    assert what in str(caught.value)
    assert max(weight.abs().max() for weight in saved_weights(config, "qa").values()) < 1
    assert len(rows_of(config, "good")) == 3


def test_a_base_that_gives_no_loss_trains_nothing(base: Path, data: str, held_out: str, tmp_path: Path) -> None:
    config = run_config(
        base, tmp_path / "run", adapter_entry("qa", data, eval_data=held_out), adapter_entry("mix", data)
    )
    trainer = new_trainer(config)
    trainer.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert "adapter 'qa': failed: eval_loss=nan must be finite" in str(caught.value)
    assert "adapter 'mix': failed: loss=nan" in str(caught.value)
    assert rows_of(config, "qa") == []
    assert [(row["loss"], row["skipped_steps"]) for row in rows_of(config, "mix")] == [(None, 1), (None, 2), (None, 3)]
    assert [row["eval_loss"] for row in rows_of(config, "qa", "eval")] == [None]
