"""Which samples an adapter learns from at each step, and which adapters share a forward."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_peft.data.dispatcher import Dispatcher, MicroBatch, StepPlan, fuse
from moe_peft.data.samples import Sample
from moe_peft.model.batch import BatchConfig


def sample(length: int, first: int = 0, num_prompt: int = 0) -> Sample:
    """``length`` tokens counted up from ``first``, so that a sample is known by its first token."""
    ids = tuple(range(first, first + length))
    return Sample(ids, (-100,) * num_prompt + ids[num_prompt:])


def plan_of(lengths: Sequence[int], name: str = "qa", **changes) -> StepPlan:
    """A plan over samples of these lengths; the i-th begins with token 1000 i."""
    settings = {"batch_size": 4, "micro_batch_size": 4, "num_epochs": 2, "max_steps": None, "seed": 0}
    return StepPlan(name, [sample(length, 1000 * i) for i, length in enumerate(lengths)], **{**settings, **changes})


def all_steps(plan: StepPlan) -> list[list[MicroBatch]]:
    return [plan.micro_batches(step) for step in range(plan.num_steps)]


def indices(step: Sequence[MicroBatch]) -> list[int]:
    """Which samples a step holds, in its order."""
    return [sample.input_ids[0] // 1000 for micro_batch in step for sample in micro_batch.samples]


def drain(dispatcher: Dispatcher) -> list[list[MicroBatch]]:
    batches = []
    while batch := dispatcher.next_batch():
        batches.append(batch)
    assert dispatcher.next_batch() == []
    return batches


def test_an_epoch_is_a_permutation_and_each_has_another() -> None:
    epochs = [
        [i for step in range(3 * epoch, 3 * epoch + 3) for i in indices(plan_of([5] * 11).micro_batches(step))]
        for epoch in range(4)
    ]
    for order in epochs:
        assert sorted(order) == list(range(11))
    assert len({tuple(order) for order in epochs}) == 4
    assert tuple(range(11)) not in {tuple(order) for order in epochs}


def test_the_last_batch_of_an_epoch_takes_what_is_left() -> None:
    plan = plan_of([5] * 11, batch_size=4, micro_batch_size=3, num_epochs=2)
    assert (plan.steps_per_epoch, plan.num_steps) == (3, 6)
    sizes = [[len(micro_batch.samples) for micro_batch in step] for step in all_steps(plan)]
    assert sizes == [[3, 1], [3, 1], [3]] * 2


@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=12),
    batch_size=st.integers(1, 14),
    micro_batch_size=st.integers(1, 14),
    num_epochs=st.integers(1, 3),
)
def test_micro_batches_partition_their_step(
    lengths: list[int], batch_size: int, micro_batch_size: int, num_epochs: int
) -> None:
    plan = plan_of(lengths, batch_size=batch_size, micro_batch_size=micro_batch_size, num_epochs=num_epochs)
    seen: Counter[int] = Counter()
    for number, step in enumerate(all_steps(plan)):
        seen.update(indices(step))
        assert [micro_batch.index for micro_batch in step] == list(range(len(step)))
        assert [micro_batch.is_last for micro_batch in step] == [False] * (len(step) - 1) + [True]
        tokens = sum(micro_batch.num_tokens for micro_batch in step)
        supervised = sum(s.num_supervised_tokens for micro_batch in step for s in micro_batch.samples)
        for micro_batch in step:
            assert 1 <= len(micro_batch.samples) <= micro_batch_size
            assert (micro_batch.adapter, micro_batch.step) == ("qa", number)
            assert (micro_batch.step_tokens, micro_batch.step_supervised) == (tokens, supervised)
        assert sum(len(micro_batch.samples) for micro_batch in step) <= batch_size
    assert seen == dict.fromkeys(range(len(lengths)), num_epochs)


def test_how_a_step_is_cut_does_not_change_what_it_holds() -> None:
    whole, cut = plan_of([5] * 11), plan_of([5] * 11, micro_batch_size=1)
    assert [indices(step) for step in all_steps(whole)] == [indices(step) for step in all_steps(cut)]


def test_supervised_tokens_leave_out_what_nothing_predicts() -> None:
    # The first token of a sample is never predicted, whatever its label.
    plan = StepPlan(
        "qa",
        [sample(5), sample(6, num_prompt=4)],
        batch_size=2,
        micro_batch_size=2,
        num_epochs=1,
        max_steps=None,
        seed=0,
    )
    (micro_batch,) = plan.micro_batches(0)
    assert (micro_batch.step_supervised, micro_batch.step_tokens) == (4 + 2, 11)


@pytest.mark.parametrize(("max_steps", "num_steps"), [(1, 1), (4, 4), (9, 9), (None, 6)])
def test_max_steps_wins_over_epochs(max_steps: int | None, num_steps: int) -> None:
    plan = plan_of([5] * 11, max_steps=max_steps)
    assert plan.num_steps == num_steps
    unbounded = all_steps(plan_of([5] * 11, num_epochs=5))
    assert [indices(step) for step in all_steps(plan)] == [indices(step) for step in unbounded[:num_steps]]


def test_the_order_is_a_function_of_the_adapters_own_name_and_seed() -> None:
    def orders(**changes) -> list[list[int]]:
        return [indices(step) for step in all_steps(plan_of([5] * 11, **changes))]

    state = torch.get_rng_state()
    first = orders()
    assert torch.equal(torch.get_rng_state(), state), "a plan draws nothing from the global generator"
    torch.manual_seed(99)
    assert orders() == first
    assert orders(seed=1) != first
    assert orders(name="qb") != first
    # Asking out of order changes nothing either: a resumed run begins in the middle.
    plan = plan_of([5] * 11)
    assert [indices(plan.micro_batches(step)) for step in (5, 0, 3)] == [first[step] for step in (5, 0, 3)]


def test_neighbours_change_neither_an_adapters_micro_batches_nor_their_order() -> None:
    def own(neighbours: dict[str, StepPlan], budget: int) -> list[MicroBatch]:
        plans = {"qa": plan_of([7] * 9, micro_batch_size=2), **neighbours}
        batches = drain(Dispatcher(plans, budget))
        return [micro_batch for batch in batches for micro_batch in batch if micro_batch.adapter == "qa"]

    alone = own({}, 10**6)
    assert alone == [micro_batch for step in all_steps(plan_of([7] * 9, micro_batch_size=2)) for micro_batch in step]
    small = {"s": plan_of([2] * 30, "s", num_epochs=5)}
    large = {"l": plan_of([60] * 7, "l", batch_size=3, micro_batch_size=3)}
    for neighbours in (small, large, {**large, **small}):
        for budget in (1, 20, 100, 10**6):
            assert own(neighbours, budget) == alone


plans = st.lists(
    st.builds(
        dict,
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
        batch_size=st.integers(1, 5),
        micro_batch_size=st.integers(1, 5),
        max_steps=st.integers(1, 6),
    ),
    min_size=1,
    max_size=4,
)


@given(settings=plans, budget=st.integers(1, 150))
def test_every_micro_batch_runs_once_in_order_and_within_the_budget(settings: list[dict], budget: int) -> None:
    made = {f"a{i}": plan_of(name=f"a{i}", **changes) for i, changes in enumerate(settings)}
    places: dict[str, list[tuple[int, int]]] = {name: [] for name in made}
    for batch in drain(Dispatcher(made, budget)):
        names = [micro_batch.adapter for micro_batch in batch]
        assert names == [name for name in made if name in names], "an adapter twice, or out of the plans' order"
        assert len(batch) == 1 or sum(micro_batch.num_tokens for micro_batch in batch) <= budget
        for micro_batch in batch:
            places[micro_batch.adapter].append((micro_batch.step, micro_batch.index))
    for name, plan in made.items():
        assert places[name] == [(part.step, part.index) for step in all_steps(plan) for part in step]


@pytest.mark.parametrize("budget", [1, 2048, 4096, 4200])
def test_long_samples_are_not_starved_by_short_ones(budget: int) -> None:
    plans = {
        "short": plan_of([20] * 64, "short", num_epochs=4),
        "long": plan_of([2000] * 8, "long", batch_size=2, micro_batch_size=2, num_epochs=3),
        "tiny": plan_of([3] * 5, "tiny", batch_size=1, micro_batch_size=1, num_epochs=1),
    }
    done = dict.fromkeys(plans, 0)
    long_when_short_ended = 0.0
    for batch in drain(Dispatcher(plans, budget)):
        shares = {name: done[name] / plan.num_steps for name, plan in plans.items()}
        assert min(shares.values()) in [shares[micro_batch.adapter] for micro_batch in batch], (
            "nobody may be left behind"
        )
        for micro_batch in batch:
            done[micro_batch.adapter] += 1
            if micro_batch.adapter == "short" and done["short"] == plans["short"].num_steps:
                long_when_short_ended = done["long"] / plans["long"].num_steps
    assert done == {name: plan.num_steps for name, plan in plans.items()}
    assert long_when_short_ended >= 1 - 1 / plans["long"].num_steps


def test_adapters_that_fit_together_run_together() -> None:
    plans = {name: plan_of([10] * 8, name) for name in "abc"}
    assert [len(batch) for batch in drain(Dispatcher(plans, 120))] == [3] * 4
    assert [len(batch) for batch in drain(Dispatcher(plans, 119))] == [2] * 6
    assert {len(batch) for batch in drain(Dispatcher(plans, 79))} == {1}


def test_a_removed_adapter_is_gone_and_the_others_go_on() -> None:
    plans = {name: plan_of([10] * 8, name, micro_batch_size=2) for name in "abc"}
    dispatcher = Dispatcher(plans, 1000)
    first = dispatcher.next_batch()
    assert [micro_batch.adapter for micro_batch in first] == ["a", "b", "c"]
    dispatcher.remove("b")  # in the middle of its step
    dispatcher.remove("b")
    dispatcher.remove("nobody")
    rest = drain(dispatcher)
    assert all([micro_batch.adapter for micro_batch in batch] == ["a", "c"] for batch in rest)
    for i, name in enumerate("ac"):
        own = [first[2 * i], *(batch[i] for batch in rest)]
        assert own == [micro_batch for step in all_steps(plans[name]) for micro_batch in step]


def test_fuse_lays_samples_end_to_end() -> None:
    parts = [
        (BatchConfig("a", 0, 0, 3, 1), [sample(2, 10), sample(1, 20)]),
        (BatchConfig("b", 0, 0, 7), [sample(3, 30, num_prompt=2)]),
    ]
    batch = fuse(parts, torch.device("cpu"))
    assert batch.input_ids.tolist() == [10, 11, 20, 30, 31, 32]
    assert batch.labels is not None
    assert batch.labels.tolist() == [10, 11, 20, -100, -100, 32]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 6]
    assert batch.batch_configs_ == (BatchConfig("a", 0, 2, 3, 1), BatchConfig("b", 2, 3, 7, 0))


def test_an_adapter_that_comes_late_neither_starves_nor_monopolises() -> None:
    plans = {
        "long": plan_of([2000] * 8, "long", batch_size=2, micro_batch_size=2, num_epochs=6),
        "short": plan_of([20] * 64, "short", batch_size=2, micro_batch_size=2, num_epochs=1),
    }
    dispatcher = Dispatcher(plans, 1)  # so that every forward has room for one alone
    shares = dict.fromkeys(["long", "short", "late"], 0.0)
    plans["late"] = plan_of([20] * 64, "late", batch_size=2, micro_batch_size=2, num_epochs=1)

    def run(count: int) -> None:
        for _ in range(count):
            (micro_batch,) = dispatcher.next_batch()
            shares[micro_batch.adapter] += 1 / plans[micro_batch.adapter].num_steps

    run(28)  # half of what there is
    assert shares["long"] == pytest.approx(0.5, abs=1 / 24)
    assert shares["short"] == pytest.approx(0.5, abs=1 / 24)
    dispatcher.add("late", plans["late"])
    before = dict(shares)
    run(22)
    gained = {name: shares[name] - before[name] for name in shares}
    assert gained["late"] == pytest.approx(gained["long"], abs=1 / 24 + 1 / 32)
    assert gained["late"] == pytest.approx(gained["short"], abs=1 / 24 + 1 / 32)
    assert min(gained.values()) > 0.1
    drain(dispatcher)


@given(settings=plans, budget=st.integers(1, 150), pause=st.integers(0, 20))
def test_from_its_cursors_a_dispatcher_goes_on_as_it_would_have(settings: list[dict], budget: int, pause: int) -> None:
    made = {f"a{i}": plan_of(name=f"a{i}", **changes) for i, changes in enumerate(settings)}
    whole, first = Dispatcher({}, budget), Dispatcher({}, budget)
    names = list(made)
    expected = []
    for dispatcher in (whole, first):
        dispatcher.add(names[0], made[names[0]])
        head = [dispatcher.next_batch() for _ in range(pause % 3)]
        for name in names[1:]:  # late ones have a start of their own
            dispatcher.add(name, made[name])
        head += [dispatcher.next_batch() for _ in range(pause)]
        expected.append(head)
    assert expected[0] == expected[1]
    second = Dispatcher({}, budget)
    for name in first.adapters:
        second.add(name, made[name], first.cursor(name))
    assert drain(second) == drain(whole)


def test_who_rejoins_is_level_with_the_furthest_behind() -> None:
    plans = {name: plan_of([10] * 40, name, num_epochs=1) for name in "ab"}
    dispatcher = Dispatcher({"a": plans["a"]}, 1)
    for _ in range(3):
        dispatcher.next_batch()
    dispatcher.rejoin("b", plans["b"], 7)
    order = [batch[0].adapter for batch in drain(dispatcher)]
    assert order == ["a", "b", "a", "b", "a", "b", "a", "a", "a", "a"]
    assert "b" not in dispatcher.adapters
