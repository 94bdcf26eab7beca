"""Every registered method beside all the others: in one fused batch it is what it is alone."""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from builders import (
    VOCAB,
    assert_close,
    assert_same_gradients,
    assert_same_output,
    backward,
    clear_gradients,
    fuse,
    random_run,
    random_samples,
    run_step,
)
from every_method import (
    CONFIGS,
    ORDERS,
    answers_only,
    crowd,
    fused_step,
    model_with,
    run_of,
    seed_of,
)
from torch import Tensor

from moe_peft import BatchConfig, LlamaForCausalLM, ModelInput
from moe_peft.generation import Request, generate_tokens
from moe_peft.model.llama import ACTIVATION_CHECKPOINTING

EVERY = pytest.mark.parametrize("name", CONFIGS)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@EVERY
def test_beside_every_other_method_it_is_as_alone(name: str, training: bool) -> None:
    """Outputs and every gradient, in several orders, and on a float64 model with a window and biases."""
    for is_other_model in (False, True):
        (alone,), solo = run_step(crowd(training, is_other_model), run_of(name))
        for order in range(len(ORDERS)) if not is_other_model else [0]:
            outputs, found = fused_step(order, training, is_other_model)
            what = f"order {order}, {is_other_model=}"
            assert_same_output(outputs[name], alone, what)
            assert_same_gradients(found[name], solo[name], what)


@functools.cache
def healthy_step(dtype: torch.dtype) -> tuple[LlamaForCausalLM, Any, Any]:
    """A model with everybody, and their outputs and gradients from one batch of equal samples."""
    model = model_with(list(CONFIGS), training=True, dtype=dtype)
    outputs, found = run_step(model, *equal_runs())
    return model, outputs, found


def equal_runs() -> list:
    """Everybody's samples, of equal lengths so that they share calls."""
    return [random_run(name, (4, 3), seed=seed, step=2) for seed, name in enumerate(["", *CONFIGS])]


# By the digits of their places: of any two configs, some half has the one alone, and some half the other.
NUM_DIGITS = len(CONFIGS).bit_length()
HALVES = {
    f"digit {digit} is {value}": [name for i, name in enumerate(CONFIGS) if i >> digit & 1 == value]
    for digit in range(NUM_DIGITS)
    for value in (0, 1)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("half", HALVES)
def test_a_nan_reaches_nobody_else(half: str, dtype: torch.dtype) -> None:
    """All weights of half of the adapters are NaN: the others' logits, losses and gradients keep every bit."""
    model, outputs, found = healthy_step(dtype)
    weights = [weight for name in HALVES[half] for weight in model.adapter_parameters(name)]
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.data.fill_(math.nan)
        sick_outputs, sick = run_step(model, *equal_runs())
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.data.copy_(value)
    for own, other in zip(sick_outputs, outputs, strict=True):
        name = own.adapter_name
        if name in HALVES[half]:
            assert own.logits.isnan().any(), name
            continue
        assert torch.equal(own.logits, other.logits), name
        assert torch.equal(own.loss, other.loss), name
        assert torch.equal(own.aux_loss, other.aux_loss), name
        for key, gradient in sick.get(name, {}).items():
            assert torch.equal(gradient, found[name][key]), f"{name}, {key}"


@functools.cache
def recomputed(mode: str, name: str | None) -> dict[str, Tensor]:
    """Every number of a training step of all, or of one alone, in that mode of activation checkpointing."""
    model = crowd(True, False)
    runs = [run_of(one) for one in (ORDERS[0] if name is None else [name])]
    runs[::2] = [dataclasses.replace(run, samples=run.samples, labels=labels_behind(run)) for run in runs[::2]]
    model.activation_checkpointing_ = mode
    try:
        clear_gradients(model)
        outputs = model(fuse(*runs))
        backward(outputs)
        found = {f"{output.adapter_name}: loss": output.loss.detach() for output in outputs}
        found |= {f"{output.adapter_name}: aux loss": output.aux_loss.detach() for output in outputs}
        for output in outputs:
            if output.adapter_name:
                for key, gradient in model.adapter_gradients(output.adapter_name).items():
                    assert gradient is not None
                    found[f"{output.adapter_name}: {key}"] = gradient.clone()
    finally:
        model.activation_checkpointing_ = "none"
        clear_gradients(model)
    return found


def labels_behind(run: Any) -> list[list[int]]:
    """Labels on each sample's last token alone, so that the last layer answers few."""
    return [[-100] * (len(sample) - 1) + sample[-1:] for sample in run.samples]


@pytest.mark.parametrize("mode", [mode for mode in ACTIVATION_CHECKPOINTING if mode != "none"])
@EVERY
def test_what_is_computed_again_changes_no_bit(name: str, mode: str) -> None:
    for whom in (None, name):
        found, expected = recomputed(mode, whom), recomputed("none", whom)
        own = [key for key in expected if key.startswith(f"{name}: ")]
        assert len(own) > 2
        for key in own:
            assert torch.equal(found[key], expected[key]), key
            assert expected[key].isfinite().all()


@functools.cache
def narrowed_step() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Everybody's outputs where few tokens carry a label, their gradients, and the same where logits are asked for."""
    model = crowd(True, False)
    runs = [answers_only(run_of(name, (6, 5))) for name in ORDERS[1]]
    clear_gradients(model)
    outputs = model(fuse(*runs))
    backward(outputs)
    narrowed = {name: {k: g.clone() for k, g in model.adapter_gradients(name).items()} for name in CONFIGS}
    full_outputs, full = run_step(model, *runs)
    pairs = {run.adapter_name: pair for run, *pair in zip(runs, outputs, full_outputs, strict=True)}
    return pairs, narrowed, full


@EVERY
def test_few_labels_give_the_loss_of_all_logits(name: str) -> None:
    """The last layer leaves out what no label asks for; where logits are asked for it cannot."""
    pairs, narrowed, full = narrowed_step()
    own, whole = pairs[name]
    assert own.logits is None
    targets = [token for sample in run_of(name, (6, 5)).samples for token in sample[-2:]]
    chosen = whole.logits.double().log_softmax(1)[[3, 4, 8, 9], targets]
    assert_close(own.loss, -chosen.mean(), 1e-5, "loss of the logits")
    assert_close(own.loss, whole.loss, 1e-5, "loss")
    assert_close(own.aux_loss, whole.aux_loss, 1e-5, "aux loss")
    assert_same_gradients(narrowed[name], full[name], name)


class Letters:
    """A tokenizer that ends nothing: only what generation asks of one."""

    prefix_ids = ()
    eos_token_ids = ()
    special_ids: dict[str, int] = {}  # noqa: RUF012

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


@functools.cache
def answered() -> dict[str, list[tuple[int, ...]]]:
    """What everybody answers to two prompts, all in one batch, with a cache."""
    model = model_with(list(CONFIGS), dtype=torch.float64)
    requests = [
        Request(prompt_ids=tuple(prompt), adapter_name=name, max_new_tokens=4)
        for prompts in zip(*(prompts_of(name) for name in ORDERS[2]), strict=True)
        for name, prompt in zip(ORDERS[2], prompts, strict=True)
    ]
    found: dict[str, list[tuple[int, ...]]] = {}
    for request, completion in zip(requests, generate_tokens(model, Letters(), requests), strict=True):
        found.setdefault(request.adapter_name, []).append(completion.token_ids)
    return found


def prompts_of(name: str) -> list[list[int]]:
    seed = seed_of(name) if name else 0
    return random_samples((1 + seed % 4, 7), seed=seed)


@EVERY
def test_its_answers_with_a_cache_are_those_without(name: str) -> None:
    """In a batch with everybody; without a cache, alone, the whole sequence anew for every token."""
    model = model_with([name], dtype=torch.float64)
    for prompt, answer in zip(prompts_of(name), answered()[name], strict=True):
        ids = list(prompt)
        for _ in answer:
            ends = torch.tensor([0, len(ids)], dtype=torch.int32)
            with torch.no_grad():
                (output,) = model(ModelInput(torch.tensor(ids), ends, (BatchConfig(name, 0, 1),)))
            assert output.logits.shape == (len(ids), VOCAB)
            ids.append(int(output.logits[-1].argmax()))
        assert tuple(ids[len(prompt) :]) == answer
        assert len(answer) == 4


def test_the_measures_see_what_they_are_to_see() -> None:
    """A gradient that is off by a thousandth, and an output by as much, are not the same."""
    outputs, found = fused_step(0, True, False)
    name = next(iter(CONFIGS))
    with pytest.raises(AssertionError):
        assert_same_gradients({key: value * 1.001 for key, value in found[name].items()}, found[name], name)
    with pytest.raises(AssertionError):
        assert_same_output(dataclasses.replace(outputs[name], loss=outputs[name].loss * 1.001), outputs[name], name)
