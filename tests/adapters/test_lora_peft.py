"""LoRA's outputs, gradients and initial weights equal those of the real peft."""

import copy
import math

import peft
import pytest
import torch
from builders import (
    Run,
    add_random_adapter,
    assert_close,
    backward,
    fuse,
    gradients,
    random_samples,
    randomize,
    tiny_model,
)
from hf_twin import ExactRotary, hf_model, twin_of

from moe_peft import LlamaConfig, LoraConfig
from moe_peft.adapters.lora import PROJECTIONS

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}
SAMPLES = random_samples((9, 4, 1, 6))
SETTINGS = {
    "default": {},
    "rank_one": {"r": 1},
    "odd_rank": {"r": 5, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "two": {"r": 3, "target_modules": ["v_proj", "down_proj"]},
    **{name: {"r": 2, "target_modules": [name]} for name in PROJECTIONS},
}


def make_pair(settings, *, dtype=torch.float32, **changes):
    """A peft model and ours that carry the same random adapter ``qa``."""
    hf = hf_model("llama", {**SIZES, **changes}, dtype=dtype)
    model = twin_of(hf, LlamaConfig(**SIZES, **changes))
    add_random_adapter(model, "qa", LoraConfig(**settings), seed=4)
    # Both spelled out where their defaults differ: peft's alpha is 8, its targets are the architecture's own choice.
    settings = {"lora_alpha": 16, "target_modules": list(PROJECTIONS), **settings}
    theirs = peft.get_peft_model(hf, peft.LoraConfig(**settings))
    theirs.to(dtype)
    state = model.adapter_state("qa")
    live = {their_name(name): parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert live.keys() == state.keys()
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(state[name])
    return theirs, model, live


def their_name(name):
    return name.replace(".default.", ".")


def their_outputs(theirs):
    """Logits of every sample, and after one backward of the mean over all supervised tokens, gradients."""
    logits, total, count = [], 0.0, 0
    for sample in SAMPLES:
        output = theirs(torch.tensor([sample])).logits[0]
        logits.append(output)
        total = total + torch.nn.functional.cross_entropy(
            output[:-1], torch.tensor(sample[1:], dtype=torch.long), reduction="sum"
        )
        count += len(sample) - 1
    loss = total / count
    loss.backward()
    return torch.cat(logits), loss


@pytest.mark.parametrize("case", SETTINGS)
def test_logits_and_gradients_equal_pefts(case):
    theirs, model, live = make_pair(SETTINGS[case])
    expected, expected_loss = their_outputs(theirs)
    (output,) = model.train()(fuse(Run("qa", SAMPLES)), return_logits=True)
    backward([output])
    assert_close(output.logits, expected, 1e-4, "logits")
    assert_close(output.loss, expected_loss, 1e-5, "loss")
    for name, gradient in gradients(model, "qa").items():
        assert live[name].grad.abs().max() > 0, name
        assert_close(gradient, live[name].grad, 1e-4, name)
    plain = model(fuse(Run("", SAMPLES), with_labels=False))[0].logits
    assert (plain - expected).abs().max() > 1e-2  # the adapter acts


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 10}], ids=str)
def test_float64_gradients_equal_pefts(changes):
    """transformers' norms and softmax stay float32 in a float64 model, hence 1e-5; its RoPE table is replaced."""
    theirs, model, live = make_pair({"r": 3, "use_rslora": True}, dtype=torch.float64, **changes)
    theirs.base_model.model.model.rotary_emb = ExactRotary(10000.0, model.config_.head_size)
    expected, expected_loss = their_outputs(theirs)
    (output,) = model(fuse(Run("qa", SAMPLES)), return_logits=True)
    backward([output])
    assert_close(output.logits, expected, 1e-5, "logits")
    assert_close(output.loss, expected_loss, 1e-6, "loss")
    for name, gradient in gradients(model, "qa").items():
        assert gradient.dtype == torch.float64
        assert_close(gradient, live[name].grad, 1e-5, name)


def test_bfloat16_base_keeps_float32_adapters():
    """Its products run in the base's dtype: over a few adapters it is as near float32 as peft all in bfloat16."""
    theirs, model, live = make_pair({"r": 4})
    low = tiny_model(model.config_).bfloat16()
    low.load_state_dict({name: weight.bfloat16() for name, weight in model.state_dict().items() if "lora" not in name})
    low.add_adapter("qa", LoraConfig(r=4))
    state = low.adapter_state("qa")
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    our_error = their_error = 0.0
    for seed in range(4):
        randomize(state, seed, std=0.2)
        with torch.no_grad():
            for name, parameter in live.items():
                parameter.copy_(state[name])
            truth, expected = (
                torch.cat([peft_model(torch.tensor([sample])).logits[0] for sample in SAMPLES])
                for peft_model in (theirs, copy.deepcopy(theirs).bfloat16())
            )
        (output,) = low(fuse(Run("qa", SAMPLES)), return_logits=True)
        our_error += (output.logits - truth).norm().item()
        their_error += (expected - truth).norm().item()
    assert our_error <= 1.3 * their_error
    backward([output])
    assert {gradient.dtype for gradient in gradients(low, "qa").values()} == {torch.float32}


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initial_weights_are_distributed_as_pefts(init):
    """Equal support or deviation of A and B, over weights enough that a wrong bound shows."""
    settings = {"r": 6, "init_lora_weights": init}
    hf = hf_model("llama", {**SIZES, "hidden_size": 160, "intermediate_size": 300})
    theirs = peft.get_peft_model(hf, peft.LoraConfig(target_modules=list(PROJECTIONS), **settings))
    model = tiny_model(LlamaConfig(**{**SIZES, "hidden_size": 160, "intermediate_size": 300}))
    model.add_adapter("qa", LoraConfig(**settings))
    ours = model.adapter_state("qa")
    for name, expected in ((their_name(n), p) for n, p in theirs.named_parameters() if p.requires_grad):
        values = ours[name]
        if "lora_B" in name and init is not False:
            assert not values.any(), name
            assert not expected.any(), name
            continue
        assert values.std().item() == pytest.approx(expected.std().item(), rel=0.15), name
        assert abs(values.mean()) < 0.15 * values.std(), name
        if init != "gaussian":
            bound = math.sqrt(1 / values.shape[1])
            assert 0.97 * bound < values.abs().max() <= bound, name
