"""The real peft on the real transformers as a worker of `peers`: what their users run, at its best setting.

SDPA attention, fused AdamW, clipping as transformers' Trainer does it, batches padded to their longest sample. The mode
is one of ``float32`` and ``bfloat16`` (the frozen weights; peft keeps LoRA in float32), ``autocast`` (float32 weights
under bf16 autocast), ``bfloat16+autocast`` (both).
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from worker import PROJECTIONS, Step, read_padded, serve

MODES = ("float32", "bfloat16", "autocast", "bfloat16+autocast")


def build(settings: dict[str, Any]) -> Step:
    """One LoRA adapter on all projections."""
    mode, device = settings["mode"], torch.device(settings["device"])
    if mode not in MODES or settings["variant"] != "lora":
        raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)} and variant={settings['variant']!r} lora")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if mode.startswith("bfloat16") else torch.float32
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    folder = Path(settings["model"])
    if (folder / "model.safetensors").is_file():
        base = AutoModelForCausalLM.from_pretrained(folder, **options).to(device)
    else:
        with device:
            base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **options)
    base.config.use_cache = False
    rank = settings["rank"]
    model = get_peft_model(
        base,
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=settings["dropout"],
            target_modules=list(PROJECTIONS),
            task_type="CAUSAL_LM",
        ),
    ).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    batches = read_padded(settings["batches"], base.config.pad_token_id or 0, device)
    for batch in batches:
        if batch["attention_mask"].all():
            del batch["attention_mask"]  # without a mask the attention is the faster causal one
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=mode.endswith("autocast"))

    def step(number: int) -> list[float]:
        with autocast:
            loss = model(**batches[number % len(batches)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [loss.item()]

    return step


if __name__ == "__main__":
    serve(build)
