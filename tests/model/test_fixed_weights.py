"""What depends on weights alone is computed once a batch of answers, of the weights that are there when it begins."""

import contextlib

import pytest
import torch
from builders import Run, fuse, run_step
from every_method import CONFIGS, model_with, run_of
from torch import Tensor

from moe_peft.generation import Request, generate_tokens
from moe_peft.generation import answer as answer_module
from moe_peft.model import linear as linear_module
from moe_peft.model.fixed_weights import fixed_weights, of_fixed_weights
from moe_peft.model.linear import Linear, Lora

EVERY = pytest.mark.parametrize("name", CONFIGS)


class NoText:
    """A tokenizer for answers of which only the ids are asked for."""

    eos_token_ids = ()
    special_ids: dict = {}  # noqa: RUF012

    def decode(self, ids, skip_special_tokens=True):
        return ""


def answers(model, *names, **options):
    requests = [Request(prompt_ids=(5, 6, 7), adapter_name=name, max_new_tokens=5) for name in names]
    return [completion.token_ids for completion in generate_tokens(model, NoText(), requests, **options)]


@torch.no_grad()
def logits(model, name) -> Tensor:
    (output,) = model(fuse(Run(name, [[5, 6, 7, 8]]), with_labels=False))
    return output.logits


class Counter:
    """Computes how often it has been asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *modules):
        self.calls += 1
        return self.calls


def test_kept_values_are_of_their_scope():
    count, other = Counter(), Counter()
    with torch.no_grad():
        assert [of_fixed_weights(count), of_fixed_weights(count)] == [1, 2]
        for first in (3, 4):
            with fixed_weights():
                assert [of_fixed_weights(count), of_fixed_weights(other), of_fixed_weights(count)] == [
                    first,
                    first - 2,
                    first,
                ]
        assert of_fixed_weights(count) == 5
        with fixed_weights():
            a, b = torch.nn.Identity(), torch.nn.Identity()
            assert [of_fixed_weights(count, one) for one in (a, b, a)] == [6, 7, 6]
            with fixed_weights():
                assert of_fixed_weights(count, a) == 8
            assert of_fixed_weights(count, a) == 6


def test_where_gradients_are_recorded_nothing_is_kept():
    """A training that begins within an answer's callback: what was kept is freed, its steps are seen."""
    count = Counter()
    with fixed_weights():
        with torch.no_grad():
            assert [of_fixed_weights(count), of_fixed_weights(count)] == [1, 1]
        with torch.enable_grad():
            assert [of_fixed_weights(count), of_fixed_weights(count)] == [2, 3]
        with torch.no_grad():
            assert [of_fixed_weights(count), of_fixed_weights(count)] == [4, 4]


def test_an_end_by_an_error_frees_as_well():
    count = Counter()
    with torch.no_grad():
        with pytest.raises(KeyError), fixed_weights():
            of_fixed_weights(count)
            raise KeyError
        assert [of_fixed_weights(count), of_fixed_weights(count)] == [2, 3]


@EVERY
def test_with_and_without_it_every_bit_is_the_same(name):
    model = model_with([name])
    plain = logits(model, name)
    with fixed_weights():
        assert torch.equal(logits(model, name), plain)
        assert torch.equal(logits(model, name), plain)  # now of what is kept


def in_place(model, name):
    for weight in model.adapter_state(name).values():
        weight.mul_(-3)


def by_data(model, name):
    """As no version counter sees it."""
    for weight in model.adapter_parameters(name):
        weight.data.mul_(-3)


def other_storage(model, name):
    for weight in model.adapter_parameters(name):
        weight.data = weight.data * -3


def trained(model, name):
    optimizer = torch.optim.SGD(model.adapter_parameters(name), lr=3.0)
    run_step(model.train(), run_of(name))
    outputs = model(fuse(run_of(name)))
    sum(output.loss + output.aux_loss for output in outputs).backward()
    optimizer.step()
    model.zero_grad()
    model.eval()


def replaced(model, name):
    state = {key: weight.clone() for key, weight in model.adapter_state(name).items()}
    model.remove_adapter(name)
    model.add_adapter(name, CONFIGS[name], seed=77)
    for key, weight in model.adapter_state(name).items():
        weight.copy_(-3 * state[key])


@EVERY
def test_whatever_changes_weights_between_answers_is_seen(name, monkeypatch):
    """One change upon the other: the logits that generation sees are those of a model that keeps nothing."""
    model, seen = model_with([name]), []
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0].logits))
    for change in (in_place, by_data, other_storage, trained, replaced):
        before = logits(model, name)
        change(model, name)
        assert not torch.equal(logits(model, name), before)
        seen.clear()
        answers(model, name)
        kept = list(seen)
        with monkeypatch.context() as patch:
            patch.setattr(answer_module, "fixed_weights", contextlib.nullcontext)
            seen.clear()
            answers(model, name)
        assert len(kept) == len(seen) == 5
        assert all(torch.equal(left, right) for left, right in zip(kept, seen, strict=True)), change.__name__


def pairs_of(model, name):
    """What ``project`` asks for a pair: the adapter's own of each projection that has one."""
    found = (module.loras_.get(name) for module in model.modules() if isinstance(module, Linear))
    return [one for one in found if one is not None]


@EVERY
def test_a_pair_is_computed_once_a_batch_and_a_plain_one_is_not_kept(name, monkeypatch):
    model = model_with([name])
    kinds = {type(one) for one in pairs_of(model, name)}
    plain = {kind for kind in kinds if kind.low_rank is Lora.low_rank}
    calls = []
    for kind in kinds - plain:
        real = kind.low_rank
        monkeypatch.setattr(kind, "low_rank", lambda one, real=real: calls.append(one) or real(one))
    kept = []
    real_keep = linear_module.of_fixed_weights
    monkeypatch.setattr(
        linear_module, "of_fixed_weights", lambda *args: kept.append(type(args[0].__self__)) or real_keep(*args)
    )
    answers(model, name)
    own = [one for one in pairs_of(model, name) if type(one) not in plain]
    in_behind = 2 if name.startswith("dora") else 1  # DoRA's lengths need the pair once more
    assert len(calls) == in_behind * len(own)
    assert not plain & set(kept)
    calls.clear()
    answers(model, name, name, batch_size=1)
    assert len(calls) == 2 * in_behind * len(own)  # once a batch
