"""What may be picked, how often it is picked, and what a draw depends on."""

import math

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moe_peft.generation import sampling as sampling_module
from moe_peft.generation.sampling import Sampling, filtered_probabilities, pick_tokens

VOCAB = 7
LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.9])


def random_logits(num_rows: int, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed))


def normalised(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities a row is drawn from, in the order of the vocabulary."""
    probabilities, ids = filtered_probabilities(logits[None], [sampling])
    in_order = torch.zeros_like(probabilities).scatter(1, ids, probabilities)
    return (in_order / in_order.sum())[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (1, 1.0), (200, 1.0), (0, 0.7), (0, 0.05), (8, 0.6)])
def test_filters_equal_transformers(temperature: float, top_k: int, top_p: float) -> None:
    for logits in random_logits(20):
        expected = TemperatureLogitsWarper(temperature)(None, logits[None])
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        ours = normalised(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
        torch.testing.assert_close(ours, expected.softmax(dim=-1)[0], rtol=1e-5, atol=1e-7)


def test_rows_are_filtered_by_their_own_settings() -> None:
    samplings = [
        Sampling(temperature=0.7, top_k=3),
        Sampling(temperature=1.3, top_p=0.5),
        Sampling(temperature=1.0),
    ]
    logits = random_logits(3)
    together, _ = filtered_probabilities(logits, samplings)
    for row, sampling in enumerate(samplings):
        alone, _ = filtered_probabilities(logits[row : row + 1], [sampling])
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(
    "settings", [{"temperature": 1.0}, {"temperature": 0.6, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8}]
)
def test_draws_have_the_distribution(vary: str, settings: dict, num_draws: int = 4000) -> None:
    numbers = range(num_draws)
    samplings = [Sampling(**settings, seed=number if vary == "seed" else 3) for number in numbers]
    positions = [number if vary == "position" else 5 for number in numbers]
    tokens = pick_tokens(LOGITS.expand(num_draws, VOCAB), samplings, positions)
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    expected = num_draws * _by_hand(LOGITS.double(), **settings)
    assert counts[expected == 0].sum() == 0
    allowed = expected > 0
    chi_square = ((counts - expected)[allowed].square() / expected[allowed]).sum().item()
    # The 0.999 quantile of chi-square with 6 degrees of freedom; with fewer it is smaller.
    assert chi_square < 22.46


def _by_hand(logits: torch.Tensor, temperature: float, top_k: int = VOCAB, top_p: float = 1.0) -> torch.Tensor:
    """The definition, token by token."""
    weights = {token: math.exp(logits[token].item() / temperature) for token in range(VOCAB)}
    best = sorted(weights, key=lambda token: -weights[token])[:top_k]
    total, kept, mass = sum(weights[token] for token in best), [], 0.0
    for token in best:
        kept.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    total = sum(weights[token] for token in kept)
    return torch.tensor([weights[token] / total if token in kept else 0.0 for token in range(VOCAB)])


def test_a_draw_depends_on_its_own_seed_and_position_alone() -> None:
    logits = random_logits(6)
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in (1, 2, 3, 1, 9, 9)]
    samplings[2] = Sampling()  # a greedy neighbour draws nothing
    positions = [4, 4, 4, 5, 0, 1]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    together = pick_tokens(logits, samplings, positions)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    for row in range(6):
        assert pick_tokens(logits[row : row + 1], [samplings[row]], [positions[row]]) == [together[row]]
    order = [5, 3, 1, 0, 2, 4]
    permuted = pick_tokens(logits[order], [samplings[row] for row in order], [positions[row] for row in order])
    assert permuted == [together[row] for row in order]


def test_seeds_and_positions_matter() -> None:
    flat = torch.zeros(64, 1000)
    by_seed = pick_tokens(flat, [Sampling(temperature=1.0, seed=seed) for seed in range(64)], [0] * 64)
    by_position = pick_tokens(flat, [Sampling(temperature=1.0)] * 64, list(range(64)))
    assert len(set(by_seed)) > 55
    assert len(set(by_position)) > 55


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=1e-45),
    ],
)
def test_greedy_and_its_limits(sampling: Sampling) -> None:
    logits = random_logits(40)
    assert pick_tokens(logits, [sampling] * 40, [0] * 40) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=1)])
def test_of_equal_logits_the_first_is_taken(sampling: Sampling) -> None:
    tied = torch.zeros(5, VOCAB, dtype=torch.bfloat16)  # which has few values, so that ties are common
    tied[:, 2:5] = 1
    assert pick_tokens(tied, [sampling] * 5, list(range(5))) == [2] * 5


def test_a_draw_that_rounds_up_to_one_takes_the_last_allowed_token(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.tensor(1 - 2.0**-53, dtype=torch.float64)
    monkeypatch.setattr(sampling_module.torch, "rand", lambda *_, **__: one)
    assert one.float() == 1
    assert pick_tokens(LOGITS[None], [Sampling(temperature=1.0, top_k=3)], [0]) == [6]
    assert pick_tokens(LOGITS[None], [Sampling(temperature=1.0)], [0]) == [1]


def test_a_broken_row_harms_no_neighbour() -> None:
    logits = random_logits(3)
    samplings = [Sampling(temperature=1.0, top_p=0.9, seed=seed) for seed in range(3)]
    expected = pick_tokens(logits, samplings, [0] * 3)
    logits[1] = math.nan
    tokens = pick_tokens(logits, samplings, [0] * 3)
    assert [tokens[0], tokens[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 must be at least 0"),
        ({"temperature": math.nan}, "temperature=nan must"),
        ({"temperature": math.inf}, "temperature=inf must"),
        ({"temperature": "hot"}, "temperature='hot' must be float"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_k": 2.5}, r"top_k=2\.5 must be int"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0 and at most 1"),
        ({"top_p": 1.01}, r"top_p=1\.01 must be above 0 and at most 1"),
        ({"seed": None}, "seed=None must be int"),
    ],
)
def test_refusals(settings: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Sampling(**settings)
