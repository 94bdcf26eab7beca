"""Co-training equals solo training: a neighbour changes nothing that an adapter computes, not even by a NaN."""

import math

import pytest
import torch
from builders import (
    IGNORE,
    Run,
    add_random_adapter,
    assert_close,
    assert_relative,
    assert_same_gradients,
    assert_same_output,
    backward,
    clear_gradients,
    fuse,
    random_run,
    random_samples,
    run_step,
    tiny_config,
    tiny_model,
)

from moe_peft import LoraConfig, MixLoraConfig, ModelInput

ADAPTERS = {
    "low": LoraConfig(r=2, lora_dropout=0.2),
    "high": LoraConfig(r=9, use_rslora=True, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"]),
    "mix": MixLoraConfig(
        r=3, num_experts=5, top_k=2, lora_dropout=0.2, router_z_loss_coef=0.1, router_jitter_noise=0.1
    ),
    "switch": MixLoraConfig(
        r=4, num_experts=3, top_k=1, router_aux_loss_coef=1.0, target_modules=["o_proj", "gate_proj"]
    ),
}
RUNS = {
    "low": random_run("low", (5, 1, 9), seed=1, step=3),
    "mix": random_run("mix", (4, 4, 4), seed=2, step=1, micro_batch=2),
    "": random_run("", (6, 2), seed=3),
    "high": random_run("high", (9,), seed=4),
    "switch": random_run("switch", (2, 7), seed=5, micro_batch=1),
}
ORDERS = [list(RUNS), ["", "switch", "high", "mix", "low"], ["mix", "switch", "low", "", "high"]]


def make_model(training=True, *, dtype=torch.float32, **config):
    model = tiny_model(tiny_config(**config), dtype=dtype)
    for i, (name, adapter) in enumerate(ADAPTERS.items()):
        add_random_adapter(model, name, adapter, seed=10 + i)
    return model.train(training)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("config", [{}, {"sliding_window": 3, "mlp_bias": True}], ids=["plain", "window"])
@pytest.mark.parametrize("training", [True, False])
def test_fused_equals_solo(training, config, order):
    model = make_model(training, **config)
    outputs, fused = run_step(model, *(RUNS[name] for name in order))
    assert [output.adapter_name for output in outputs] == order
    for name, output in zip(order, outputs, strict=True):
        (alone,), solo = run_step(model, RUNS[name])
        assert_same_output(output, alone, name)
        if name:
            assert_same_gradients(fused[name], solo[name], name)


def test_fused_is_near_solo_in_bfloat16():
    """Equal up to the rounding of products whose shapes differ; adapters stay float32."""
    model = make_model(dtype=torch.bfloat16)
    outputs, fused = run_step(model, *RUNS.values())
    for name, output in zip(RUNS, outputs, strict=True):
        (alone,), solo = run_step(model, RUNS[name])
        assert_close(output.loss, alone.loss, 0.02, name)
        assert_close(output.aux_loss, alone.aux_loss, 0.02, name)
        for key, gradient in fused.get(name, {}).items():
            assert gradient.dtype == torch.float32
            total = torch.stack([wanted.norm() for wanted in solo[name].values()]).norm().item()
            assert_relative(gradient, solo[name][key], 0.05, f"{name}, {key}", floor=0.1 * total)


@pytest.mark.parametrize("name", ADAPTERS)
def test_solo_among_the_attached_equals_solo_in_the_world(name):
    """Adapters that are attached but absent from the batch cost nothing, to the bit."""
    outputs, found = run_step(make_model(), RUNS[name])
    alone = tiny_model()
    add_random_adapter(alone, name, ADAPTERS[name], seed=10 + list(ADAPTERS).index(name))
    solo_outputs, solo = run_step(alone.train(), RUNS[name])
    assert torch.equal(outputs[0].logits, solo_outputs[0].logits)
    assert all(torch.equal(gradient, solo[name][key]) for key, gradient in found[name].items())


def test_bare_base_samples_get_the_base_models_own_logits():
    bare = tiny_model()
    (expected,) = bare(fuse(RUNS[""]), return_logits=True)
    (alone,) = make_model()(fuse(RUNS[""]), return_logits=True)
    assert torch.equal(alone.logits, expected.logits)
    for order in ORDERS:
        fused = make_model()(fuse(*(RUNS[name] for name in order)), return_logits=True)[order.index("")]
        assert_close(fused.logits, expected.logits, 1e-5, str(order))
        assert_close(fused.loss, expected.loss, 1e-5, str(order))
        assert fused.aux_loss == 0
        assert fused.router_logits is None


POISONED = [
    ("low", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    ("low", "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"),
    ("mix", "mixlora.layers.0.self_attn.v_proj.lora_B.weight"),
    ("mix", "mixlora.layers.0.mlp.moe_gate.weight"),
    ("mix", "mixlora.layers.1.mlp.moe_gate.weight"),
    ("mix", "mixlora.layers.0.mlp.gate_proj.experts.1.lora_A.weight"),
    ("mix", "mixlora.layers.1.mlp.down_proj.experts.0.lora_B.weight"),
    ("switch", "mixlora.layers.0.mlp.gate_proj.experts.2.lora_B.weight"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(("victim", "key"), POISONED)
def test_a_nan_reaches_no_other_adapter(victim, key, poison, dtype):
    """Neighbours' losses, logits and gradients keep every bit; all runs have equal samples so that they share calls."""
    runs = [
        random_run(name, (4, 4), seed=seed, step=2) for seed, name in enumerate(["", "low", "mix", "high", "switch"])
    ]
    model = make_model(dtype=dtype)
    outputs, healthy = run_step(model, *runs)
    model.adapter_state(victim)[key].fill_(poison)
    poisoned_outputs, poisoned = run_step(model, *runs)
    sick = False
    for run, output, after in zip(runs, outputs, poisoned_outputs, strict=True):
        name = run.adapter_name
        if name == victim:
            sick = not torch.equal(output.logits, after.logits)
            continue
        assert torch.equal(after.logits, output.logits), name
        assert torch.equal(after.loss, output.loss), name
        assert torch.equal(after.aux_loss, output.aux_loss), name
        for weight, gradient in poisoned.get(name, {}).items():
            assert torch.equal(gradient, healthy[name][weight]), f"{name}, {weight}"
    assert sick


def test_absent_adapters_get_no_gradient():
    model = make_model()
    backward(model(fuse(RUNS["low"], RUNS[""], RUNS["mix"])))
    for name in ADAPTERS:
        present = name in ("low", "mix")
        assert all((gradient is not None) == present for gradient in model.adapter_gradients(name).values()), name
    assert all(
        parameter.grad is None for key, parameter in model.named_parameters() if "lora" not in key and "moes" not in key
    )


def test_each_loss_reaches_its_own_adapter_alone():
    """A backward through one run's loss leaves the neighbours' gradients at exactly zero."""
    model = make_model()
    for name in ADAPTERS:
        clear_gradients(model)
        outputs = model(fuse(*RUNS.values()))
        (own,) = (output for output in outputs if output.adapter_name == name)
        (own.loss + own.aux_loss).backward()
        for other in ADAPTERS:
            norms = [gradient.norm().item() for gradient in model.adapter_gradients(other).values()]
            assert any(norms) == (other == name), (name, other)


def test_loss_is_exactly_zero_without_supervised_tokens():
    model = make_model()
    outputs, found = run_step(model, RUNS["mix"].unlabelled(), RUNS["low"], RUNS["high"].unlabelled())
    assert [output.num_supervised_tokens > 0 for output in outputs] == [False, True, False]
    assert outputs[0].loss.item() == 0.0
    assert outputs[2].loss.item() == 0.0
    assert not any(gradient.any() for gradient in found["high"].values())
    assert outputs[0].aux_loss > 0  # routing is trained all the same
    assert any(gradient.any() for gradient in found["mix"].values())
    (_, low, _), _ = run_step(model, RUNS["mix"].unlabelled(), RUNS["low"], RUNS["high"].unlabelled())
    assert_close(low.loss, run_step(model, RUNS["low"])[0][0].loss, 1e-5)
    for runs in ([RUNS["high"].unlabelled()], [run.unlabelled() for run in RUNS.values()]):
        clear_gradients(model)
        outputs = model(fuse(*runs))
        assert all(output.loss.item() == 0.0 for output in outputs)
        backward(outputs)


def test_without_labels_there_is_no_loss():
    (low, mix) = make_model()(fuse(RUNS["low"], RUNS["mix"], with_labels=False))
    assert low.loss == mix.loss == 0
    assert low.num_supervised_tokens == mix.num_supervised_tokens == 0
    assert low.logits.shape == (15, 61)
    assert mix.aux_loss > 0


def test_no_loss_across_the_borders_of_samples():
    """A sample's first token is predicted by nothing, whatever stands before it."""
    model = make_model()
    samples = random_samples((3, 1, 4))
    only_firsts = [[sample[0]] + [IGNORE] * (len(sample) - 1) for sample in samples]
    outputs = model(fuse(Run("low", samples, only_firsts), Run("", samples, only_firsts)))
    assert [(output.loss.item(), output.num_supervised_tokens) for output in outputs] == [(0.0, 0)] * 2


def test_losses_are_means_over_the_supervised_tokens():
    """Recomputed from the logits, sample by sample."""
    outputs, _ = run_step(make_model(), *RUNS.values())
    for run, output in zip(RUNS.values(), outputs, strict=True):
        log_probabilities = output.logits.double().log_softmax(-1)
        total, count, first = 0.0, 0, 0
        for labels in run.labels:
            for place, label in enumerate(labels):
                if place and label != IGNORE:
                    total, count = total - log_probabilities[first + place - 1, label], count + 1
            first += len(labels)
        assert output.num_supervised_tokens == count
        assert_close(output.loss, total / count, 1e-5, run.adapter_name)


def test_one_adapter_in_two_runs():
    """Each run has a loss of its own; the gradients add up."""
    model = make_model(training=False)
    first, second = random_run("mix", (4, 2), seed=8), random_run("mix", (5,), seed=9)
    outputs, fused = run_step(model, first, RUNS[""], second)
    (left,), left_grads = run_step(model, first)
    (right,), right_grads = run_step(model, second)
    assert_same_output(outputs[0], left, "first")
    assert_same_output(outputs[2], right, "second")
    both = {key: gradient + right_grads["mix"][key] for key, gradient in left_grads["mix"].items()}
    assert_same_gradients(fused["mix"], both, "both")


def test_an_expert_beside_its_own_mixture():
    model = make_model(training=False)
    expert, mixture = random_run("moe.mix.experts.3", (4, 2), seed=8), RUNS["mix"]
    outputs, _ = run_step(model, expert, mixture, RUNS["low"])
    (alone,), _ = run_step(model, expert)
    assert_same_output(outputs[0], alone, "expert")
    assert_same_output(outputs[1], run_step(model, mixture)[0][0], "mixture")


def test_samples_may_be_cut_into_runs_at_will():
    """Two batch configs of one adapter are its samples still: logits do not care where a run ends."""
    model = make_model(training=False)
    samples = random_samples((3, 3, 5))
    (whole,) = model(fuse(Run("mix", samples), with_labels=False))
    parts = model(fuse(Run("mix", samples[:1]), Run("mix", samples[1:]), with_labels=False))
    assert_close(torch.cat([part.logits for part in parts]), whole.logits, 1e-5)
    assert isinstance(fuse(Run("mix", samples)), ModelInput)
