"""AdaLoRA's training, step for step beside PEFT's documented loop: the same ranks and masks, the same factors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from builders import assert_close
from hf_twin import ExactRotary
from tiny_run import adapter_entry, new_trainer, run_config

from moe_peft import Trainer
from moe_peft.adapters.lora import PROJECTIONS

pytestmark = pytest.mark.usefixtures("no_pictures")

NUM_STEPS = 34
SCHEDULES = {
    "every step": {"init_r": 3, "target_r": 1},
    "every third, with phases": {"init_r": 4, "target_r": 2, "tinit": 5, "tfinal": 9, "deltaT": 3},
    "a sum of its own": {"init_r": 5, "target_r": 2, "tinit": 3, "tfinal": 4, "deltaT": 4, "total_step": 26},
    "plain": {"init_r": 3, "target_r": 2, "tinit": 4, "orth_reg_weight": 0.0, "beta1": 0.6, "beta2": 0.7},
}


def trainer_of(base: Path, data: str, folder: Path, **settings: Any) -> Trainer:
    """A run of one AdaLoRA adapter, in micro-batches, clipped."""
    entry = adapter_entry(
        "qa",
        data,
        method="adalora",
        lora_alpha=8,
        batch_size=3,
        micro_batch_size=2,
        max_steps=NUM_STEPS,
        lr=2e-2,
        lr_scheduler="constant",
        max_grad_norm=0.8,
        weight_decay=0.05,
        **settings,
    )
    del entry["r"]
    return new_trainer(run_config(base, folder, entry, dtype="float64"))


def peft_twin(trainer: Trainer, settings: dict[str, Any]) -> peft.PeftModel:
    """transformers and PEFT with the weights that the trainer begins with, in float64."""
    hf = transformers.LlamaForCausalLM.from_pretrained(trainer.config.base_model, dtype=torch.float64)
    hf.model.rotary_emb = ExactRotary(10000.0, hf.config.hidden_size // hf.config.num_attention_heads)
    config = peft.AdaLoraConfig(
        lora_alpha=8, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM", **{"total_step": NUM_STEPS, **settings}
    )
    twin = peft.get_peft_model(hf, config).double().train()
    state = trainer.model.adapter_state("qa")
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if "ranknum" in name:
                weight.requires_grad_(False)  # as PEFT means it: in float64 it takes it for a weight
            elif weight.requires_grad:
                weight.copy_(state[name.replace(".default", "")])
    return twin


def our_steps(trainer: Trainer) -> Iterator[list[Any]]:
    """Take the run's steps; after each, what it learnt from."""
    run = trainer.fused_run
    trainer.model.train()
    seen: list[Any] = []
    while run.queue.jobs["qa"].run.is_active:
        micro_batches = run.dispatcher.next_batch()
        seen += [sample for micro_batch in micro_batches for sample in micro_batch.samples]
        if run.take_step(micro_batches):
            yield seen
            seen = []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_masks_and_factors_are_pefts_at_every_step(schedule: str, base: Path, data: str, tmp_path: Path) -> None:
    trainer = trainer_of(base, data, tmp_path / "run", **SCHEDULES[schedule])
    trainer.fused_run.admit()
    twin = peft_twin(trainer, SCHEDULES[schedule])
    weights = [weight for name, weight in twin.named_parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-2, weight_decay=0.05)
    allocator = twin.base_model
    peft_config = twin.peft_config["default"]
    patterns = set()
    for step, samples in enumerate(our_steps(trainer), start=1):
        total = sum(sample.num_supervised_tokens for sample in samples)
        for sample in samples:
            labels = torch.tensor([sample.labels])
            loss = twin(torch.tensor([sample.input_ids]), labels=labels).loss
            (loss * (sample.num_supervised_tokens / total)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.8)
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()

        state, masks = trainer.model.adapter_state("qa"), trainer.model.adapter_buffers("qa")
        pattern = peft_config.rank_pattern
        for name, weight in twin.named_parameters():
            if weight.requires_grad:
                key = name.replace(".default", "")
                assert_close(state[key], weight, 1e-5, f"step {step}: {key}")
            if "lora_E" in name and pattern is not None:
                key = name.replace(".lora_E.default", ".rank_mask")
                expected = pattern[name.removeprefix("base_model.model.")]
                assert masks[key].tolist() == expected, f"step {step}: {key}"
                assert (weight == 0).view(-1).tolist() == (state[name.replace(".default", "")] == 0).view(-1).tolist()
        if pattern is not None:
            patterns.add(str(pattern))
    assert step == NUM_STEPS
    assert len(patterns) > 4
    left = sum(int(mask.sum()) for key, mask in masks.items() if key.endswith("rank_mask"))
    assert left == SCHEDULES[schedule]["target_r"] * 14  # two layers of seven projections
