"""The proof holds on honest code, in wide and narrow dtypes, and sees every leak that is planted."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from tiny_run import adapter_entry, instructions, quiet_console, run_config, write_jsonl
from torch import Tensor

import moe_peft.model.decoder as decoder
from moe_peft import LlamaForCausalLM, ops
from moe_peft.adapters.mixlora import MixLora
from moe_peft.config import TrainConfig
from moe_peft.kernels.compiled import references_only
from moe_peft.training.proof.verify import verify

DTYPES = ["float32", "bfloat16"]


def told(config: TrainConfig, num_steps: int = 2) -> tuple[bool, str]:
    """The verdict, and all that was printed."""
    console = quiet_console()
    return verify(config, num_steps, console), console.file.getvalue()


def honest_entries(data: str) -> list[dict]:
    """Adapters of different kinds, with noise, batches and paces of their own; one sees a single sample at a time."""
    mixture = {"method": "mixlora", "num_experts": 4, "lora_dropout": 0.1}
    return [
        adapter_entry("plain", data, r=2, lora_dropout=0.2, batch_size=3),
        adapter_entry("pair", data, target_modules=["q_proj", "v_proj"], batch_size=2, optimizer="sgd"),
        adapter_entry("mix", data, **mixture, router_jitter_noise=0.1, batch_size=5, micro_batch_size=3),
        adapter_entry("one", data, method="mixlora", num_experts=3, top_k=1, batch_size=1, router_z_loss_coef=1e-2),
    ]


@pytest.mark.parametrize("dtype", [*DTYPES, "float16", "float64"])
def test_honest_code_passes(dtype: str, base: Path, data: str, tmp_path: Path) -> None:
    config = run_config(base, tmp_path / "run", *honest_entries(data), dtype=dtype)
    is_same, text = told(config)
    assert is_same, text
    assert "Proved: all 8 comparisons are equal to the bit." in text
    # Under a loss scale the first step may overflow, and the next one is compared in its place.
    assert all(
        len(re.findall(rf"^{name}, step \d: same$", text, re.M)) == 2 for name in ("plain", "pair", "mix", "one")
    )
    assert not (tmp_path / "run").exists()


def leak_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens attend to all that stands before them in the batch."""
    honest = decoder.varlen_attention

    def leaky(q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[int, ...], *others: object) -> Tensor:
        return honest(q, k, v, (0, boundaries[-1]), *others)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "varlen_attention", leaky)


def leak_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of an adapter gets the low-rank products of its neighbour."""
    honest = ops.lora_linear

    def leaky(x: object, weights: object, biases: object, ranges: list[ops.LoraRange]) -> list[Tensor]:
        if len(ranges) > 1:
            first, second, *rest = ranges
            ranges = [
                dataclasses.replace(first, end=first.end + 1),
                dataclasses.replace(second, start=second.start + 1),
                *rest,
            ]
        return honest(x, weights, biases, ranges)

    monkeypatch.setattr(ops, "lora_linear", leaky)


def leak_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is the mean over the supervised tokens of the whole batch."""
    honest = LlamaForCausalLM._losses

    def leaky(*arguments: object) -> list[tuple[Tensor, int]]:
        losses = honest(*arguments)  # type: ignore[arg-type]
        total = sum(count for _, count in losses)
        return [(loss * count / total, count) for loss, count in losses]

    monkeypatch.setattr(LlamaForCausalLM, "_losses", leaky)


def leak_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture that is not alone routes its first token by its last one's logits."""
    honest = MixLora.router_logits

    def leaky(self: MixLora, x: ops.Recomputable, segment: object, batch: object) -> Tensor:
        logits = honest(self, x, segment, batch)  # type: ignore[arg-type]
        return torch.cat([-logits[:1], logits[1:]]) if len(batch.segments) > 1 else logits  # type: ignore[attr-defined]

    monkeypatch.setattr(MixLora, "router_logits", leaky)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("leak", "what"),
    [
        (leak_attention, "its neighbours change its gradient"),
        (leak_token, "its neighbours change its gradient"),
        (leak_loss, "its neighbours change its loss"),
        (leak_routing, "routing choices differ by more than rounding"),
    ],
)
def test_a_leak_is_seen(leak, what: str, dtype: str, base: Path, data: str, tmp_path: Path, monkeypatch) -> None:
    entries = [
        adapter_entry("first", data, batch_size=3),
        adapter_entry("second", data, batch_size=2),
        adapter_entry("mix", data, method="mixlora", num_experts=4, batch_size=2),
    ]
    config = run_config(base, tmp_path / "run", *entries, dtype=dtype)
    leak(monkeypatch)
    is_same, text = told(config)
    assert not is_same
    assert what in text and "Not proved" in text


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_pytorch_operations_are_equal_to_the_bit_too(
    dtype: str, base: Path, data: str, tmp_path: Path
) -> None:
    config = run_config(base, tmp_path / "run", *honest_entries(data), dtype=dtype)
    with references_only():
        is_same, text = told(config)
    assert is_same and "Proved: all 8 comparisons are equal to the bit." in text, text


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_adapter_is_checked_for_the_order_of_its_samples(
    dtype: str, base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(base, tmp_path / "run", adapter_entry("qa", data, lora_dropout=0.1), dtype=dtype)
    is_same, text = told(config)
    assert is_same, text
    assert "there was nothing to fuse" in text and "only rounding differs" in text
    leak_attention(monkeypatch)
    is_same, text = told(config)
    assert not is_same
    assert "the order of its samples changes its gradient" in text


def test_a_loss_that_is_not_finite_is_told(
    base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = LlamaForCausalLM._losses

    def broken(*arguments: object) -> list[tuple[Tensor, int]]:
        (loss, count), *rest = honest(*arguments)  # type: ignore[arg-type]
        return [(loss * torch.nan, count), *rest]

    monkeypatch.setattr(LlamaForCausalLM, "_losses", broken)
    entries = [adapter_entry("bad", data), adapter_entry("good", data)]
    is_same, text = told(run_config(base, tmp_path / "run", *entries), 1)
    assert not is_same
    assert "bad, step 1: in the fused batch: loss=nan and aux_loss=0.0 must be finite" in text


@pytest.mark.parametrize("changes", [{"max_concurrent_adapters": 2}, {"max_batch_tokens": 80}])
def test_every_adapter_has_its_turn(changes: dict, base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", instructions(40))
    steps = {"long": 20, "short": 2, "middle": 5, "last": 20}
    entries = [adapter_entry(name, data, batch_size=2, max_steps=count) for name, count in steps.items()]
    is_same, text = told(run_config(base, tmp_path / "run", *entries, **changes), 3)
    assert is_same, text
    for name, count in steps.items():
        assert text.count(f"{name}, step ") == min(count, 3), text


def test_no_steps_prove_nothing(base: Path, data: str, tmp_path: Path) -> None:
    config = run_config(base, tmp_path / "run", adapter_entry("qa", data))
    with pytest.raises(ValueError, match="verify=0 must be at least 1 step"):
        verify(config, 0, quiet_console())
