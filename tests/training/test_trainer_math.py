"""What a run computes, against training loops written by hand on transformers, PEFT and plain torch."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from builders import assert_close
from hf_twin import ExactRotary
from safetensors.torch import load_file
from tiny_run import adapter_entry, new_trainer, run_config

from moe_peft import BatchConfig, Trainer, load_base_model
from moe_peft.data.dispatcher import fuse
from moe_peft.io.adapter_files import save_adapter
from moe_peft.training.folder.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("no_pictures")

NOISE = {"lora_dropout": 0.2, "router_jitter_noise": 0.2}


def step_rows(trainer: Trainer, adapter: str = "qa") -> list[dict]:
    rows = read_metrics(Path(str(trainer.config.output_dir)) / "metrics.jsonl")
    return [row for row in rows if row["event"] == "step" and row["adapter"] == adapter]


def final_weights(trainer: Trainer, adapter: str = "qa") -> dict[str, torch.Tensor]:
    return load_file(Path(str(trainer.config.output_dir)) / "adapters" / adapter / "adapter_model.safetensors")


def peft_twin(trainer: Trainer, folder: Path) -> torch.nn.Module:
    """transformers and PEFT with the weights that the trainer begins with, in float64."""
    hf = transformers.LlamaForCausalLM.from_pretrained(trainer.config.base_model, dtype=torch.float64)
    hf.model.rotary_emb = ExactRotary(10000.0, hf.config.hidden_size // hf.config.num_attention_heads)
    save_adapter(trainer.model, "qa", folder)
    twin = peft.PeftModel.from_pretrained(hf, str(folder), is_trainable=True)
    assert all(weight.dtype == torch.float64 for weight in twin.parameters())
    return twin.train()


Optimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


@pytest.mark.parametrize(
    ("settings", "make_optimizer"),
    [
        (
            {"lr_scheduler": "constant", "max_grad_norm": None, "weight_decay": 0.1, "betas": [0.8, 0.95]},
            lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95)),
        ),
        (
            {"lr_scheduler": "linear", "max_grad_norm": 0.5, "eps": 1e-6, "micro_batch_size": 3},
            lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0, eps=1e-6),
        ),
        (
            {"lr_scheduler": "cosine", "max_grad_norm": 0.5, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
            lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9, weight_decay=0.01),
        ),
    ],
    ids=["adamw", "adamw in micro-batches, clipped", "sgd, clipped"],
)
def test_a_run_is_the_textbook_loop(
    settings: dict, make_optimizer: Optimizer, base: Path, data: str, tmp_path: Path
) -> None:
    entry = adapter_entry("qa", data, batch_size=7, max_steps=4, use_rslora=True, target_modules="all-linear")
    trainer = new_trainer(run_config(base, tmp_path / "run", {**entry, **settings}, dtype="float64"))
    twin = peft_twin(trainer, tmp_path / "initial")
    weights = [weight for weight in twin.parameters() if weight.requires_grad]
    optimizer = make_optimizer(weights)
    schedules = {
        "constant": transformers.get_constant_schedule,
        "linear": lambda optimizer: transformers.get_linear_schedule_with_warmup(optimizer, 0, 4),
        "cosine": lambda optimizer: transformers.get_cosine_schedule_with_warmup(optimizer, 0, 4),
    }
    schedule = schedules[settings["lr_scheduler"]](optimizer)
    plan = trainer.jobs["qa"].data.plan
    expected = []
    for step in range(4):
        samples = [sample for micro_batch in plan.micro_batches(step) for sample in micro_batch.samples]
        num_supervised = sum(label != -100 for sample in samples for label in sample.labels[1:])
        loss = sum(
            torch.nn.functional.cross_entropy(
                twin(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1],
                torch.tensor(sample.labels[1:]),
                reduction="sum",
            )
            for sample in samples
        )
        loss = loss / num_supervised
        loss.backward()
        limit = settings["max_grad_norm"] or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(weights, limit)
        assert limit == float("inf") or norm > limit, "the test must clip something"
        expected.append((loss.item(), norm.item(), schedule.get_last_lr()[0], num_supervised))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    trainer.train()
    # transformers takes norms and softmax in float32 even here, and torch clips by norm + 1e-6 where we take the norm.
    tolerance = 1e-6
    for row, (loss, norm, rate, num_supervised) in zip(step_rows(trainer), expected, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=tolerance)
        assert row["grad_norm"] == pytest.approx(norm, rel=tolerance)
        assert row["lr"] == pytest.approx(rate, rel=1e-12)
        assert row["num_supervised_tokens"] == num_supervised
    theirs = peft.get_peft_model_state_dict(twin)
    for key, weight in final_weights(trainer).items():
        assert_close(weight, theirs[key], tolerance, key)


@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_micro_batches_are_weighted_as_documented(method: str, base: Path, data: str, tmp_path: Path) -> None:
    """Token losses by the supervised tokens of the whole step, router losses by the share of its tokens."""
    changes = {"num_experts": 4, "router_z_loss_coef": 1e-2, **NOISE} if method == "mixlora" else {"lora_dropout": 0.2}
    entry = adapter_entry("qa", data, method=method, batch_size=7, micro_batch_size=2, max_steps=4, **changes)
    config = run_config(base, tmp_path / "run", {**entry, "lr_scheduler": "constant"}, dtype="float64")
    trainer = new_trainer(config)
    plan = trainer.jobs["qa"].data.plan
    model = load_base_model(base, dtype="float64", device="cpu").train()
    model.add_adapter("qa", config.adapters[0].adapter)
    optimizer = torch.optim.AdamW(model.adapter_parameters("qa"), lr=1e-2, weight_decay=0.0)
    losses, aux_losses = [], []
    for step in range(4):
        samples = [sample for micro_batch in plan.micro_batches(step) for sample in micro_batch.samples]
        num_supervised = sum(label != -100 for sample in samples for label in sample.labels[1:])
        num_tokens = sum(len(sample.input_ids) for sample in samples)
        loss_sum = aux_sum = 0.0
        for index, start in enumerate(range(0, len(samples), 2)):
            part = samples[start : start + 2]
            (output,) = model(fuse([(BatchConfig("qa", 0, 0, step, index), part)], model.device))
            loss = output.loss * output.num_supervised_tokens / num_supervised
            aux_loss = output.aux_loss * sum(len(sample.input_ids) for sample in part) / num_tokens
            (loss + aux_loss).backward()
            loss_sum += loss.item()
            aux_sum += aux_loss.item()
        torch.nn.utils.clip_grad_norm_(model.adapter_parameters("qa"), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum)
        aux_losses.append(aux_sum)
    trainer.train()
    assert [row["loss"] for row in step_rows(trainer)] == pytest.approx(losses, rel=1e-6)
    assert [row["aux_loss"] for row in step_rows(trainer)] == pytest.approx(aux_losses, rel=1e-6)
    assert (aux_losses[0] > 0) is (method == "mixlora")
    for key, weight in final_weights(trainer).items():
        assert_close(weight, model.adapter_state("qa")[key], 1e-6, key)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 6])
def test_accumulation_gives_the_gradient_of_the_whole_batch(
    micro_batch_size: int, base: Path, data: str, tmp_path: Path
) -> None:
    # 18 samples in batches of 7: each epoch's last step has 4, and the prompts and answers differ in length.
    weights, rows = [], []
    for name, size in (("whole", None), ("cut", micro_batch_size)):
        entry = adapter_entry("qa", data, batch_size=7, max_steps=5, micro_batch_size=size)
        trainer = new_trainer(run_config(base, tmp_path / name, entry, dtype="float64"))
        trainer.train()
        weights.append(final_weights(trainer))
        rows.append(step_rows(trainer))
    for key, weight in weights[0].items():
        assert_close(weights[1][key], weight, 1e-9, key)
    for whole, cut in zip(*rows, strict=True):
        for field in ("loss", "grad_norm", "num_supervised_tokens", "num_tokens", "lr", "epoch"):
            assert cut[field] == pytest.approx(whole[field], rel=1e-9), field


def test_a_mixture_without_router_losses_accumulates_exactly_too(base: Path, data: str, tmp_path: Path) -> None:
    weights = []
    for name, size in (("whole", None), ("cut", 2)):
        changes = {"method": "mixlora", "num_experts": 4, "router_aux_loss_coef": 0.0, "micro_batch_size": size}
        trainer = new_trainer(run_config(base, tmp_path / name, adapter_entry("qa", data, **changes), dtype="float64"))
        trainer.train()
        weights.append(final_weights(trainer))
    for key, weight in weights[0].items():
        assert_close(weights[1][key], weight, 1e-9, key)
