"""The original, PyPI's moe-peft 2.0.2, as a worker of `peers`: unmodified, on its CPU executor, at its best setting.

Its own model, adapters, losses and backward; no recomputation, though its dispatcher always asks for it; AdamW fused,
though its trainer's is not. It asserts that dropout is above zero, so none means a dropout of one in a million. The
mode is ``float32`` or ``bfloat16``, the dtype that it loads the base model in; its LoRA is always float32.
"""

import os
from typing import Any

os.environ["MOE_PEFT_EXECUTOR_TYPE"] = "CPU"  # it reads this as it is imported

import torch
from worker import PROJECTIONS, Step, read_padded, serve

import moe_peft  # theirs, not ours

LEAST_DROPOUT = 1e-6
MODES = ("float32", "bfloat16")


def build(settings: dict[str, Any]) -> Step:
    """``lora``, ``mixlora``, or several of one of them that share every batch."""
    mode, variant = settings["mode"], settings["variant"]
    count, _, method = variant.partition("x") if variant[0].isdigit() else ("1", "", variant)
    if mode not in MODES or settings["device"] != "cpu":
        raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)} and device={settings['device']!r} cpu")
    torch.manual_seed(0)
    model = moe_peft.LLMModel.from_pretrained(settings["model"], "cpu", load_dtype=getattr(torch, mode))
    names = [f"{method}_{number}" for number in range(int(count))]
    optimizers = []
    for name in names:
        model.init_adapter(_adapter(method, name, settings))
        trained = [weight for weight in model.get_adapter_weight_dict(name).values() if weight.requires_grad]
        optimizers.append(torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True))
    batches = read_padded(settings["batches"], 0, torch.device("cpu"))

    def step(number: int) -> list[float]:
        batch = batches[number % len(batches)]
        share = len(batch["input_ids"]) // len(names)
        outputs = model.forward(
            moe_peft.LLMModelInput(
                batch_configs_=[
                    moe_peft.LLMBatchConfig(name, i * share, (i + 1) * share) for i, name in enumerate(names)
                ],
                batch_tokens_=batch["input_ids"],
                batch_labels_=batch["labels"],
                batch_masks_=batch["attention_mask"],
                gradient_checkpoint_="none",
            )
        )
        losses = [output.loss for output in outputs]
        sum(loss + (output.aux_loss or 0.0) for loss, output in zip(losses, outputs, strict=True)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [loss.item() for loss in losses]

    return step


def _adapter(method: str, name: str, settings: dict[str, Any]) -> Any:
    rank = settings["rank"]
    factors = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": settings["dropout"] or LEAST_DROPOUT}
    options: dict[str, Any] = {**factors, "target_modules": list(PROJECTIONS)}
    if method == "mixlora":
        options |= {
            "routing_strategy": "mixlora",
            "num_experts": settings["experts"],
            "top_k": settings["top_k"],
            "router_aux_loss_coef": 0.01,
            "expert_lora": factors,
        }
    return moe_peft.adapter_factory(method.upper(), name, **options)


if __name__ == "__main__":
    serve(build)
