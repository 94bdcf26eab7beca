"""Out of memory, fewer adapters share a forward and a lone micro-batch is split; the gradients stay what they were."""

from collections.abc import Iterator

import pytest
import torch
from builders import add_random_adapter, tiny_model

from moe_peft import LoraConfig, ModelInput
from moe_peft.data.dispatcher import MicroBatch
from moe_peft.data.samples import Sample
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.fused_step import Outcome, run_fused

LENGTHS = {"a": (5, 7, 3), "b": (4, 6)}


@pytest.fixture
def model() -> LlamaForCausalLM:
    model = tiny_model(dtype=torch.float64)
    for name in LENGTHS:
        add_random_adapter(model, name, LoraConfig(r=2), seed=3)
    return model


def micro_batch(name: str) -> MicroBatch:
    samples = []
    for length in LENGTHS[name]:
        ids = tuple(range(1, length + 1))
        samples.append(Sample(ids, ids))
    return MicroBatch(
        adapter=name,
        step=0,
        index=0,
        is_last=True,
        samples=tuple(samples),
        step_supervised=sum(LENGTHS[name]) - len(samples),
        step_tokens=sum(LENGTHS[name]),
    )


def run(
    model: LlamaForCausalLM, room: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Outcome], list[int], list[str]]:
    """Outcomes, sizes of the forwards that went through, and messages, where a forward of more tokens has no room."""
    forward = LlamaForCausalLM.forward
    sizes: list[int] = []

    def limited(self: LlamaForCausalLM, batch: ModelInput, **options: object) -> object:
        if len(batch.input_ids) > room:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(batch.input_ids))
        return forward(self, batch, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LlamaForCausalLM, "forward", limited)
    said: list[str] = []
    parameters = {name: model.adapter_parameters(name) for name in LENGTHS}
    return run_fused(model, [micro_batch(name) for name in LENGTHS], parameters, said.append), sizes, said


def summed(outcomes: list[Outcome], name: str) -> Iterator[torch.Tensor]:
    mine = [outcome for outcome in outcomes if outcome.micro_batch.adapter == name]
    for parts in zip(*(outcome.gradients for outcome in mine), strict=True):
        assert all(part is not None for part in parts)
        yield torch.stack([part for part in parts if part is not None]).sum(dim=0)


@pytest.mark.parametrize(
    ("room", "sizes", "num_splits"),
    [(25, [25], 0), (24, [15, 10], 0), (12, [5, 10, 10], 1), (9, [5, 7, 3, 4, 6], 3)],
)
def test_any_room_gives_the_same_gradients(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, room: int, sizes: list[int], num_splits: int
) -> None:
    expected, _, _ = run(model, 1000, monkeypatch)
    found, forwards, said = run(model, room, monkeypatch)
    assert forwards == sizes
    assert len(said) == num_splits and all("out of memory" in message for message in said)
    for name in LENGTHS:
        mine = [outcome for outcome in found if outcome.micro_batch.adapter == name]
        assert [outcome.micro_batch.is_last for outcome in mine] == [False] * (len(mine) - 1) + [True]
        assert len({outcome.micro_batch.draw_index for outcome in mine}) == len(mine)
        whole = next(outcome for outcome in expected if outcome.micro_batch.adapter == name)
        assert sum(outcome.loss for outcome in mine) == pytest.approx(whole.loss, rel=1e-12)
        for part, gradient in zip(summed(found, name), whole.gradients, strict=True):
            torch.testing.assert_close(part, gradient, rtol=1e-9, atol=1e-12)


def test_a_sample_that_does_not_fit_fails_alone(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, _, _ = run(model, 6, monkeypatch)
    failures = [outcome for outcome in outcomes if outcome.failure is not None]
    assert [outcome.failure for outcome in failures] == ["a sample of 7 tokens does not fit into memory"]
    assert {outcome.micro_batch.adapter for outcome in failures} == {"a"}


def test_nothing_is_accumulated(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run(model, 12, monkeypatch)
    assert all(weight.grad is None for weight in model.parameters())
