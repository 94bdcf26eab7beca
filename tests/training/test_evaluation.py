"""Held-out losses against a sum over samples taken one by one."""

from collections.abc import Sequence

import pytest
import torch
from builders import add_random_adapter, random_samples, tiny_model
from torch import Tensor

from moe_peft import BatchConfig, LlamaForCausalLM, LoraConfig, MixLoraConfig, ModelInput
from moe_peft.data.samples import Sample
from moe_peft.training.evaluation import evaluate

LENGTHS = {"qa": [5, 9, 2, 13, 7], "mix": [3, 20, 4], "": [6, 6]}


@pytest.fixture
def model() -> LlamaForCausalLM:
    model = tiny_model(dtype=torch.float64)
    # Noise that must stay out of an evaluation.
    add_random_adapter(model, "qa", LoraConfig(r=3, lora_dropout=0.5))
    add_random_adapter(
        model, "mix", MixLoraConfig(r=2, num_experts=3, lora_dropout=0.5, router_jitter_noise=0.5), seed=5
    )
    return model


def samples_of(name: str) -> list[Sample]:
    """Samples whose prompts are of different lengths."""
    found = random_samples(LENGTHS[name], seed=len(name))
    return [Sample(tuple(ids), (-100,) * (i % 4) + tuple(ids[i % 4 :])) for i, ids in enumerate(found)]


def direct(model: LlamaForCausalLM, name: str, samples: Sequence[Sample]) -> tuple[float, int]:
    """Mean over the supervised tokens of minus log softmax, one sample at a time."""
    losses: list[Tensor] = []
    for sample in samples:
        ids = torch.tensor(sample.input_ids)
        config = BatchConfig(name, 0, 1)
        (output,) = model(ModelInput(ids, torch.tensor([0, len(ids)]), (config,)))
        log_probabilities = output.logits.detach().log_softmax(dim=1)
        losses += [-log_probabilities[i - 1, label] for i, label in enumerate(sample.labels) if i > 0 and label != -100]
    return torch.stack(losses).mean().item(), len(losses)


@pytest.mark.parametrize("budget", [1, 8, 21, 40, 10**6])
def test_losses_are_those_of_the_samples_one_by_one(model: LlamaForCausalLM, budget: int) -> None:
    held_out = {name: samples_of(name) for name in LENGTHS}
    measured = evaluate(model.train(), held_out, budget)
    model.eval()
    for name, (loss, count) in measured.items():
        expected_loss, expected_count = direct(model, name, held_out[name])
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert count == expected_count


@pytest.mark.parametrize("budget", [8, 21, 40])
def test_forwards_stay_within_the_budget_and_hold_every_sample_once(
    model: LlamaForCausalLM, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[ModelInput] = []
    forward = model.forward

    def recording(model_input: ModelInput):
        batches.append(model_input)
        return forward(model_input)

    monkeypatch.setattr(model, "forward", recording)
    held_out = {name: samples_of(name) for name in LENGTHS}
    evaluate(model, held_out, budget)
    for batch in batches:
        assert len(batch.input_ids) <= budget or len(batch.boundaries_) == 2
    seen = {name: [] for name in LENGTHS}
    for batch in batches:
        for config in batch.batch_configs_:
            for i in range(config.batch_start_idx, config.batch_end_idx):
                ids = batch.input_ids[batch.boundaries_[i] : batch.boundaries_[i + 1]]
                seen[config.adapter_name].append(tuple(ids.tolist()))
    assert seen == {name: [sample.input_ids for sample in samples] for name, samples in held_out.items()}


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_leaves_the_model_as_it_was(model: LlamaForCausalLM, training: bool) -> None:
    model.train(training)
    state = torch.get_rng_state()
    evaluate(model, {"qa": samples_of("qa")}, 100)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="'nobody' is not attached"):
        evaluate(model, {"nobody": samples_of("qa")}, 100)
    assert model.training is training, "also when it fails"


def test_nothing_supervised_is_no_loss(model: LlamaForCausalLM) -> None:
    unsupervised = [Sample((3, 4, 5), (3, -100, -100))]
    assert evaluate(model, {"qa": unsupervised}, 100) == {"qa": (0.0, 0)}
    assert evaluate(model, {}, 100) == {}
