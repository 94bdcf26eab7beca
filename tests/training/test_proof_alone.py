"""What an adapter has alone is what it has in company: its draws, its routing and its gradients, in any order."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import adapter_entry, run_config

from moe_peft.config import TrainConfig
from moe_peft.data.tokenizer import load_tokenizer
from moe_peft.io.base_model import load_base_model
from moe_peft.model.forward import Replay, chosen_experts
from moe_peft.training.adapter_run import AdapterRun
from moe_peft.training.fused_run import FusedRun
from moe_peft.training.fused_step import Outcome, run_fused
from moe_peft.training.preparation import JobReader
from moe_peft.training.proof.alone import Alone
from moe_peft.training.proof.check import Examination, _Noise
from moe_peft.training.proof.gradients import GradientMeter


def first_batch(config: TrainConfig) -> tuple[dict[str, AdapterRun], dict[str, Outcome]]:
    """The adapters, every weight of theirs random, and what the first fused batch gives them."""
    model = load_base_model(config.base_model, dtype=config.dtype, device="cpu")
    fused_run = FusedRun(config, model, JobReader(load_tokenizer(config.base_model), 0), print)
    for job in config.adapters:
        fused_run.take_in(job)
    fused_run.admit()
    runs = {job.name: job.run for job in fused_run.queue.running if job.run is not None}
    generator = torch.Generator().manual_seed(0)
    for run in runs.values():
        for weight in run.parameters:
            weight.data.normal_(std=0.2, generator=generator)
    model.train()
    parameters = {name: run.parameters for name, run in runs.items()}
    outcomes = run_fused(model, fused_run.dispatcher.next_batch(), parameters, print)
    return runs, {outcome.micro_batch.adapter: outcome for outcome in outcomes}


@pytest.fixture(scope="module")
def fused(base: Path, data: str, tmp_path_factory: pytest.TempPathFactory):
    noise = {"lora_dropout": 0.3, "batch_size": 4}
    mixture = {"method": "mixlora", "num_experts": 4, "router_jitter_noise": 0.3, "router_aux_loss_coef": 0.5}
    entries = [adapter_entry("plain", data, **noise), adapter_entry("mix", data, **noise, **mixture)]
    return first_batch(run_config(base, tmp_path_factory.mktemp("run"), *entries, dtype="float64"))


@pytest.mark.parametrize("name", ["plain", "mix"])
@pytest.mark.parametrize("order", [None, (2, 0, 3, 1)], ids=["as it was", "permuted"])
def test_draws_follow_the_samples(name: str, order: tuple[int, ...] | None, fused) -> None:
    runs, outcomes = fused
    alone, logits = Alone(runs[name].model, runs[name], outcomes[name], print)(order=order)
    assert alone.loss == pytest.approx(outcomes[name].loss, rel=1e-12)
    assert alone.aux_loss == pytest.approx(outcomes[name].aux_loss, rel=1e-12)
    for gradient, expected in zip(alone.gradients, outcomes[name].gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    for own, seen in zip(logits, outcomes[name].router_logits or (), strict=True):
        torch.testing.assert_close(own, seen, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "mix"])
def test_without_the_replay_a_permutation_draws_other_masks(name: str, fused) -> None:
    runs, outcomes = fused
    micro_batch = outcomes[name].micro_batch
    turned = replace(micro_batch, samples=micro_batch.samples[::-1])
    (other,) = run_fused(runs[name].model, [turned], {name: runs[name].parameters}, print)
    assert other.loss != pytest.approx(outcomes[name].loss, rel=1e-3)


def test_a_replayed_choice_has_the_earlier_value_and_the_own_gradient() -> None:
    earlier = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    own = torch.tensor([[3.1, 2.2, 1.3], [3.0, 1.4, 1.5]], requires_grad=True)
    replay = Replay(torch.arange(2), 2, (earlier,))
    routed = replay.routed(0, own, 2)
    assert torch.equal(routed, torch.stack([own[0], earlier[1]]))
    assert torch.equal(chosen_experts(routed, 2), chosen_experts(earlier, 2))
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (routed * weights).sum().backward()
    assert own.grad is not None and torch.equal(own.grad, weights)
    assert torch.equal(replay.own_router_logits[0], own.detach())


@pytest.mark.parametrize(("gap", "num_wrong"), [(1e-10, 0), (1e-3, 1)])
def test_a_flip_is_forgiven_within_the_noise_alone(gap: float, num_wrong: int, fused) -> None:
    """One token's choice between two experts is made by the fused batch and, by this much, not alone."""
    runs, outcomes = fused
    name = "mix"
    _, logits = Alone(runs[name].model, runs[name], outcomes[name], print)()
    seen = logits[1].clone()
    _, second, third, _ = seen[5].sort(descending=True).values
    own = torch.where(seen == third, second + gap, seen)  # what the third has alone; 2 are chosen
    outcome = replace(outcomes[name], router_logits=(logits[0], seen))
    examination = Examination(runs[name].model, runs[name], outcome, 0.5)
    assert examination._flips((logits[0], own), None) == (1, num_wrong)


@pytest.fixture(scope="module")
def fused16(base: Path, data: str, tmp_path_factory: pytest.TempPathFactory):
    entries = [adapter_entry(name, data, batch_size=4) for name in ("one", "two")]
    return first_batch(run_config(base, tmp_path_factory.mktemp("run16"), *entries, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("change", "noise", "problem"),
    [
        (0.9e-5, None, None),  # float32's limit holds for a single sample
        (1.1e-5, None, "its neighbours change its gradient"),
        (2.9e-4, 1e-4, None),  # three times what other orders change
        (3.1e-4, 1e-4, "its neighbours change its gradient"),
        (1e-6, 1.5e-2, None),  # two units in bfloat16's last place
        (1e-6, 1.6e-2, "the order of its samples changes its gradient"),
        (1e-4, 1.6e-2, "its neighbours change its gradient"),  # such an order explains nothing
    ],
)
def test_the_limits_of_16_bits(change: float, noise: float | None, problem: str | None, fused16) -> None:
    runs, outcomes = fused16
    alone = outcomes["one"]
    gradients = [gradient.double() for gradient in alone.gradients]
    alone = replace(alone, gradients=gradients)
    moved = replace(alone, gradients=[gradient * (1 + change) for gradient in gradients])
    examination = Examination(runs["one"].model, runs["one"], moved, 0.5)
    count = len(GradientMeter(runs["one"].model, "one").names)
    measured = None if noise is None else _Noise(torch.full((count,), noise, dtype=torch.float64), [0.0, 0.0], [])
    check = examination._judge(alone, (), measured)
    assert check.is_good == (problem is None)
    assert problem is None or any(problem in found for found in check.problems)
    assert not check.is_exact


def test_orders_are_others_and_each_is_taken_once(fused16) -> None:
    runs, outcomes = fused16
    orders = list(Examination(runs["one"].model, runs["one"], outcomes["one"], 0.5)._orders())
    assert len(orders) == len(set(orders)) == 5
    assert all(sorted(order) == [0, 1, 2, 3] and order != (0, 1, 2, 3) for order in orders)
    two = replace(outcomes["one"].micro_batch, samples=outcomes["one"].micro_batch.samples[:2])
    of_two = Examination(runs["one"].model, runs["one"], replace(outcomes["one"], micro_batch=two), 0.5)
    assert list(of_two._orders()) == [(1, 0)]


def test_distances_are_those_of_the_formula(fused) -> None:
    runs, outcomes = fused
    meter = GradientMeter(runs["mix"].model, "mix")
    expected = outcomes["mix"].gradients
    generator = torch.Generator().manual_seed(1)
    found = [gradient + torch.randn(gradient.shape, generator=generator, dtype=torch.float64) for gradient in expected]
    total = torch.cat([gradient.flatten() for gradient in expected]).norm()
    assert meter.norm(expected) == pytest.approx(float(total), rel=1e-12)
    places = {}
    for i, weight in enumerate(runs["mix"].parameters):
        places[id(weight)] = i
    distances = dict(zip(meter.names, meter.distance(found, expected).tolist(), strict=True))
    for key, weight, expert in runs["mix"].model.named_adapter_weights("mix"):
        pair = [side[places[id(weight)]] for side in (found, expected)]
        one, other = pair if expert is None else (side[expert] for side in pair)
        assert distances[key] == pytest.approx(float((one - other).norm() / max(other.norm(), 1e-3 * total)), rel=1e-9)


def test_no_gradient_on_both_sides_is_no_difference_and_nan_is_a_large_one(fused) -> None:
    runs, outcomes = fused
    meter = GradientMeter(runs["plain"].model, "plain")
    expected = list(outcomes["plain"].gradients)
    assert meter.distance([None, *expected[1:]], [None, *expected[1:]]).max() == 0
    assert meter.distance([None, *expected[1:]], expected)[0] == pytest.approx(1)
    assert meter.distance([expected[0] * torch.nan, *expected[1:]], expected)[0] == torch.inf
