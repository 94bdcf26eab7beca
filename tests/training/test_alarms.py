"""Alarms: once each, with layer, expert and numbers, and never of a healthy router."""

import numpy as np
import pytest

from moe_peft.training.display.alarms import Alarms
from moe_peft.training.folder.metrics import ExpertMetrics, JobMetrics


class Run:
    """Feeds counts to alarms, ten optimizer steps a row, and keeps what they say."""

    def __init__(self, top_k=None, **options):
        self.said = []
        self.alarms = Alarms(self.said.append, {"qa": 1} if top_k is None else top_k, **options)
        self.step = 0

    def feed(self, counts, times=1, adapter="qa"):
        for _ in range(times):
            self.step += 10
            self.alarms.take(ExpertMetrics(adapter=adapter, step=self.step, counts=tuple(map(tuple, counts))))
        return self.said


EVEN = [25, 25, 25, 25]


def test_a_collapsed_layer_is_told_once_after_its_steps():
    run = Run(num_steps=30)
    collapsed = [EVEN, [2, 1, 95, 2]]
    assert run.feed(collapsed, 2) == []
    (text,) = run.feed(collapsed)
    for piece in ("qa", "step 30", "collapsed router", "layer 1, 95% to expert 2", "for 30 steps", "balance is 25%"):
        assert piece in text
    assert run.feed(collapsed, 20) == [text]
    run.feed([EVEN, EVEN], 3)
    assert run.feed(collapsed, 20) == [text]


def test_a_layer_that_recovers_in_time_is_not_told():
    run = Run(num_steps=30)
    for _ in range(5):
        run.feed([[95, 1, 2, 2]], 2)
        run.feed([EVEN])
    assert run.said == []


def test_the_share_is_one_of_tokens_whatever_the_top_k():
    # With two experts a token, one that every token visits has half of all visits; 0.46 of them are 92% of the tokens.
    assert "layer 0, 92% to expert 0" in Run({"qa": 2}, num_steps=10).feed([[46, 18, 18, 18]])[0]
    assert Run({"qa": 2}, num_steps=10).feed([[44, 20, 18, 18]]) == []
    # Where every token visits every expert there is no choice that could collapse.
    assert Run({"qa": 4}, num_steps=10).feed([EVEN], 20) == []


def test_dead_experts_are_told_once_with_what_balance_would_be():
    run = Run(num_steps=40, collapse_share=1.0)
    dead = [EVEN, [0, 60, 40, 0]]
    assert run.feed(dead, 3) == []
    (text,) = run.feed(dead)
    for piece in ("qa", "step 40", "dead experts", "layer 1, experts 0, 3", "no token in 40 steps", "would be 100"):
        assert piece in text
    assert run.feed(dead, 10) == [text]
    told = run.feed([[0, 50, 25, 25], [25, 25, 25, 25]], 10)
    assert len(told) == 2 and "layer 0, expert 0:" in told[1]


def test_an_expert_that_gets_a_token_now_and_then_lives():
    run = Run(num_steps=40)
    for _ in range(5):
        run.feed([[0, 40, 30, 30]], 3)
        run.feed([[1, 39, 30, 30]])
    assert run.said == []


def test_few_tokens_are_no_proof_of_death():
    assert Run(num_steps=40).feed([[0, 1, 1, 1]], 10) == []
    assert Run(num_steps=40).feed([[0, 0, 0, 0]], 100) == []


def test_a_model_of_many_layers_fits_a_line():
    (text,) = Run(num_steps=10).feed([[100, 0, 0, 0]] * 40)[:1]
    assert "layer 5" in text and "layer 6" not in text and "and 34 more layers" in text
    assert len(text) < 500


def test_adapters_are_watched_apart_and_an_unknown_one_too():
    run = Run({}, num_steps=20)
    run.feed([[100, 0]], adapter="a")
    run.feed([[100, 0]], adapter="b")
    assert run.said == []
    run.feed([[100, 0]], adapter="a")
    assert run.said and all(text.startswith("Warning: a, step 30") for text in run.said)


@pytest.mark.parametrize("is_caught_up", [True, False])
def test_a_resumed_run_says_nothing_twice(is_caught_up):
    rows = [ExpertMetrics(adapter="qa", step=step, counts=((100, 0),)) for step in (10, 20, 30, 40)]
    first, second = Run(num_steps=30), Run(num_steps=30)
    for row in rows:
        first.alarms.take(row)
    assert len(first.said) == 2
    if is_caught_up:
        second.alarms.catch_up([JobMetrics(adapter="qa", state="running"), *rows])
    second.alarms.take(ExpertMetrics(adapter="qa", step=50, counts=((100, 0),)))
    # Without the rows of before, one row is ten steps, not the fifty of its step's number.
    assert second.said == []


def test_healthy_routers_are_left_alone():
    draw, run = np.random.default_rng(0), Run({"qa": 2})
    for _ in range(60):
        run.feed(draw.multinomial(800, draw.dirichlet(np.full(8, 8.0)), size=6).tolist())
    assert run.said == []
