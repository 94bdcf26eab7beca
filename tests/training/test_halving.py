"""Successive halving: who waits, who goes on, and that nothing but the numbers decides."""

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_peft.adapters import LoraConfig
from moe_peft.config import AdapterJob, Sweep
from moe_peft.training.halving import Decision, Halving

QA = Sweep(name="qa", halve_every=5)


def member(name: str, sweep: str | None = "qa") -> AdapterJob:
    return AdapterJob(name=name, method="lora", adapter=LoraConfig(), data="x", eval_data="y", sweep=sweep)


def halving_of(names: Sequence[str], sweep: Sweep = QA) -> Halving:
    return Halving([sweep], [member(name, sweep.name) for name in names])


def goes_on(decisions: dict[str, Decision]) -> list[str]:
    return [name for name, decision in decisions.items() if decision.goes_on]


def test_members_wait_for_the_last_and_the_better_half_goes_on() -> None:
    halving = halving_of("abcd")
    assert next(step for step in range(12) if halving.is_rung("a", step)) == 5
    assert halving.arrive("c", 3.0) == halving.arrive("a", 1.0) == halving.arrive("d", 4.0) == {}
    assert not halving.is_rung("a", 5), "it stands there already"
    assert halving.arrive("b", 2.0) == {
        "a": Decision(True, "eval_loss 1 at step 5 is rank 1 of 4; 2 go on"),
        "b": Decision(True, "eval_loss 2 at step 5 is rank 2 of 4; 2 go on"),
        "c": Decision(False, "eval_loss 3 at step 5 is rank 3 of 4; 2 go on"),
        "d": Decision(False, "eval_loss 4 at step 5 is rank 4 of 4; 2 go on"),
    }
    assert [halving.is_rung("a", step) for step in (5, 9, 10)] == [False, False, True]
    assert not halving.is_rung("c", 10), "it is out"
    assert halving.arrive("a", 9.0) == {}
    assert goes_on(halving.arrive("b", 0.5)) == ["b"]
    assert not halving.is_rung("b", 15), "nobody is left to compare it with"


def test_others_than_the_members_of_a_halved_sweep_are_left_alone() -> None:
    halving = Halving([QA, Sweep(name="plain")], [member("a"), member("b"), member("c", "plain"), member("d", None)])
    for name in "cde":
        halving.observe(name, 1.0)
        assert not halving.is_rung(name, 5)
        assert not halving.needs_eval(name)
        assert halving.leave(name) == {}
    assert halving.needs_eval("a")


def test_equals_go_on_in_the_configs_order_and_what_is_not_finite_comes_last() -> None:
    halving = halving_of("abcdef")
    for name, loss in (("f", 1.0), ("e", 1.0), ("c", math.nan), ("b", math.inf), ("a", None)):
        assert halving.arrive(name, loss) == {}
    decisions = halving.arrive("d", 1.0)
    assert list(decisions) == list("abcdef")
    assert goes_on(decisions) == ["d", "e", "f"]
    assert decisions["c"].reason == "eval_loss not finite at step 5 is rank 6 of 6; 3 go on"


@pytest.mark.parametrize(
    ("keep", "count", "kept"),
    [(0.5, 5, 3), (0.5, 2, 1), (0.1, 3, 1), (0.55, 100, 55), (0.07, 100, 7), (1 / 3, 3, 1), (0.9, 5, 5), (1e-9, 4, 1)],
)
def test_the_share_that_goes_on_is_rounded_up_and_not_by_floating_point(keep: float, count: int, kept: int) -> None:
    names = [f"m{index}" for index in range(count)]
    halving = halving_of(names, Sweep(name="qa", halve_every=1, keep=keep))
    for index, name in enumerate(names):
        decisions = halving.arrive(name, float(index))
    assert goes_on(decisions) == names[:kept]


def test_nobody_waits_for_one_that_has_ended() -> None:
    halving = halving_of("abcd")
    assert halving.leave("d") == {}
    halving.arrive("a", 1.0)
    halving.arrive("c", 0.5)
    assert goes_on(halving.leave("b")) == ["c"], "of the two that were left"
    assert halving.leave("b") == {}, "a second end says nothing"

    waiting = halving_of("ab")
    waiting.arrive("a", 1.0)
    assert goes_on(waiting.leave("b")) == ["a"]
    alone = halving_of("ab")
    alone.arrive("a", 1.0)
    assert alone.leave("a") == {}, "one that was stopped while it waited"
    assert not alone.is_rung("b", 5)


def test_the_training_loss_is_the_mean_since_the_last_rung() -> None:
    halving = halving_of("ab", Sweep(name="qa", halve_every=2, keep=0.9, metric="loss"))
    assert not halving.needs_eval("a")
    for name, losses in (("a", (1.0, math.nan, 3.0)), ("b", (5.0, 2.0))):
        for loss in losses:
            halving.observe(name, loss)
    halving.arrive("a")
    first = halving.arrive("b")
    assert [d.reason.split(" at ")[0] for d in first.values()] == ["loss 2", "loss 3.5"]
    halving.observe("a", 8.0)
    halving.arrive("a")
    second = halving.arrive("b")
    assert [d.reason.split(" at ")[0] for d in second.values()] == ["loss 8", "loss not finite"]


def test_sweeps_do_not_wait_for_one_another() -> None:
    other = Sweep(name="other", halve_every=3)
    halving = Halving([QA, other], [member("a"), member("x", "other"), member("b"), member("y", "other")])
    halving.arrive("x", 2.0)
    halving.arrive("a", 1.0)
    assert goes_on(halving.arrive("y", 1.0)) == ["y"]
    assert goes_on(halving.arrive("b", 2.0)) == ["a"]


def run_to_the_end(
    losses: Sequence[Sequence[float]], fails: dict[int, int], order: Sequence[int], *, restart: bool
) -> dict[str, str]:
    """States of members that take turns in ``order``: ``losses[i][k]`` at rung k, ``fails[i]`` the rung it fails at."""
    names = [f"m{index}" for index in range(len(losses))]
    halving, rungs, ended = halving_of(names), [0] * len(losses), dict[str, str]()
    waiting = set[str]()

    def take(decisions: dict[str, Decision]) -> None:
        for name, decision in decisions.items():
            waiting.discard(name)
            if not decision.goes_on:
                ended[name] = "halved"

    while len(ended) < len(names):
        moved = False
        for index in order:
            name = names[index]
            if name in waiting or name in ended:
                continue
            moved = True
            rung = rungs[index]
            rungs[index] += 1
            if fails.get(index) == rung:
                ended[name] = "failed"
                take(halving.leave(name))
            elif rung == len(losses[0]):
                ended[name] = "done"
                take(halving.leave(name))
            elif halving.is_rung(name, 5 * (rung + 1)):
                waiting.add(name)
                take(halving.arrive(name, losses[index][rung]))
            if restart:
                state = json.loads(json.dumps(halving.state(), allow_nan=False))
                halving = halving_of(names)
                halving.restore(state)
                assert halving.state() == state
        assert moved, "everybody waits"
    return ended


def halved_in_rounds(losses: Sequence[Sequence[float]], fails: dict[int, int]) -> dict[str, str]:
    """The same by the rule alone, round by round."""
    living, ended = list(range(len(losses))), {}
    for rung in range(len(losses[0])):
        for index in [index for index in living if fails.get(index) == rung]:
            ended[index] = "failed"
            living.remove(index)
        best = sorted(living, key=lambda index: (losses[index][rung], index))[: (len(living) + 1) // 2]
        ended |= {index: "halved" for index in living if index not in best}
        living = [index for index in living if index in best]
    last = len(losses[0])
    return {
        f"m{i}": s for i, s in {**ended, **{i: "failed" if fails.get(i) == last else "done" for i in living}}.items()
    }


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_order_of_arrival_and_a_restart_at_any_moment_change_nothing(data: st.DataObject) -> None:
    count, rungs = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    loss = st.sampled_from([0.1, 0.5, 1 / 3, 2.0])
    losses = data.draw(st.lists(st.lists(loss, min_size=rungs, max_size=rungs), min_size=count, max_size=count))
    fails = data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, rungs)))
    order = data.draw(st.permutations(range(count)))
    assert run_to_the_end(losses, fails, order, restart=True) == halved_in_rounds(losses, fails)


def test_a_state_of_other_members_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the state is of the members \['a', 'b'\], not of \['a', 'c'\]$"):
        halving_of("ac").restore(halving_of("ab").state())
