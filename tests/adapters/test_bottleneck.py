"""Bottleneck adapters against a formula of one token and one feature at a time, in float64."""

import math

import peft_twin
import pytest
import torch
from builders import (
    IGNORE,
    Run,
    add_random_adapter,
    assert_close,
    assert_same_gradients,
    assert_same_output,
    backward,
    clear_gradients,
    fuse,
    gradients,
    random_run,
    random_samples,
    run_step,
    tiny_config,
    tiny_model,
)
from naive_model import NaiveModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers.activations import ACT2FN

from moe_peft import BottleneckConfig, LoraConfig, load_adapter, save_adapter
from moe_peft.adapters.activations import ACTIVATIONS
from moe_peft.adapters.bottleneck import PLACEMENTS
from moe_peft.io.adapter_files import WEIGHTS_FILE
from moe_peft.model.draws import dropout_mask


def gelu(x):
    return x * (1 + (x / math.sqrt(2)).erf()) / 2


FORMULAS = {
    "celu": lambda x: x if x > 0 else x.exp() - 1,
    "elu": lambda x: x if x > 0 else x.exp() - 1,
    "gelu": gelu,
    "gelu_10": lambda x: gelu(x).clamp(-10, 10),
    "gelu_tanh": lambda x: x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2,
    "hardshrink": lambda x: x if x.abs() > 0.5 else 0 * x,
    "hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "hardtanh": lambda x: x.clamp(-1, 1),
    "laplace": lambda x: (1 + ((x - 0.707107) / 0.282095 / math.sqrt(2)).erf()) / 2,
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "linear": lambda x: x,
    "logsigmoid": lambda x: -(1 + (-x).exp()).log(),
    "mish": lambda x: x * (1 + x.exp()).log().tanh(),
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "relu": lambda x: x if x > 0 else 0 * x,
    "relu2": lambda x: x * x if x > 0 else 0 * x,
    "relu6": lambda x: x.clamp(0, 6),
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * (x.exp() - 1)),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "silu": lambda x: x / (1 + (-x).exp()),
    "softplus": lambda x: (1 + x.exp()).log(),
    "softshrink": lambda x: x - 0.5 if x > 0.5 else (x + 0.5 if x < -0.5 else 0 * x),
    "softsign": lambda x: x / (1 + x.abs()),
    "sqrtsoftplus": lambda x: (1 + x.exp()).log().sqrt(),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "tanhshrink": lambda x: x - x.tanh(),
}
OTHER_NAMES = {"gelu_orig": "gelu", "gelu_python": "gelu", "identity": "linear", "leakyrelu": "leaky_relu"}
OTHER_NAMES |= {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh"}
OTHER_NAMES |= {"gelu_python_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
TRAINED = {"prelu", "xielu"}  # activations of transformers with parameters of their own
SUBLAYERS = {"houlsby": ["self_attn", "mlp"], "pfeiffer": ["mlp"]}
SEED = 7


class NaiveBottleneck(NaiveModel):
    """The naive model with a bottleneck adapter."""

    def __init__(self, model, name, config):
        super().__init__(model, name, seed=SEED)
        self.settings = config

    def attention(self, layer, x, lengths):
        return self.behind(layer, "self_attn", super().attention(layer, x, lengths))

    def mlp(self, layer, x):
        y, routed = super().mlp(layer, x)
        return self.behind(layer, "mlp", y), routed

    def behind(self, layer, sublayer, z):
        if sublayer not in SUBLAYERS[self.settings.placement]:
            return z
        key = f"bottleneck.layers.{layer}.{sublayer}"
        down, down_bias, up, up_bias = (
            self.weights[f"{key}.adapter_{way}.{part}"] for way in ("down", "up") for part in ("weight", "bias")
        )
        act = FORMULAS[self.settings.activation]
        masked = z * self.mask(layer, sublayer, z)
        rows = []
        for token in range(len(z)):
            hidden = torch.stack([act(down[j] @ masked[token] + down_bias[j]) for j in range(len(down))])
            rows.append(z[token] + self.settings.scaling * (up @ hidden + up_bias))
        return torch.stack(rows)

    def mask(self, layer, sublayer, z):
        if not self.training or self.settings.dropout == 0:
            return 1.0
        key = (SEED, self.name, self.run.step, self.run.micro_batch, "dropout", layer, f"behind {sublayer}")
        return dropout_mask(tuple(z.shape), self.settings.dropout, like=torch.empty(0, dtype=torch.float64), key=key)


def assert_equals_formula(config, run, *, training=True, tolerance=1e-9):
    model = tiny_model(tiny_config(mlp_bias=True), dtype=torch.float64).train(training)
    add_random_adapter(model, "qa", config, seed=SEED)
    naive = NaiveBottleneck(model, "qa", config)
    expected = naive(run)
    expected.loss.backward()
    (output,), found = run_step(model, run)
    assert_close(output.logits, expected.logits, 1e-9, "logits")
    assert_close(output.loss, expected.loss, 1e-9, "loss")
    for key, gradient in naive.gradients().items():
        assert gradient.abs().max() > 0, key
        assert_close(found["qa"][key], gradient, tolerance, key)
    with torch.no_grad():
        assert (output.logits - model(fuse(Run("", run.samples)), return_logits=True)[0].logits).abs().max() > 1e-2


def test_every_activation_has_its_formula():
    assert FORMULAS.keys() | OTHER_NAMES.keys() == ACTIVATIONS.keys()
    for other, name in OTHER_NAMES.items():
        assert ACTIVATIONS[other] is ACTIVATIONS[name], other
    assert SUBLAYERS.keys() == PLACEMENTS.keys()


@pytest.mark.parametrize("activation", sorted({*ACT2FN} - TRAINED | {name for name in ACTIVATIONS if hasattr(F, name)}))
def test_a_name_means_what_it_means_in_torch_and_transformers(activation):
    """Values and gradients, far from zero, too."""
    x = torch.cat([torch.linspace(-30, 30, 241), torch.linspace(-2, 2, 81)]).double() + 1e-3
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    function = ACT2FN[activation] if activation in ACT2FN else getattr(F, activation)
    found, expected = ACTIVATIONS[activation](ours), function(theirs)
    (found.sum() + expected.sum()).backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", FORMULAS)
def test_forward_and_gradients_equal_the_formula(activation):
    config = BottleneckConfig(bottleneck_size=12, activation=activation)
    # In the gradient of hardsigmoid torch's 1/6 is of float32, whatever the dtype.
    tolerance = 1e-7 if activation == "hardsigmoid" else 1e-9
    assert_equals_formula(config, random_run("qa", (5, 1, 3), seed=3), tolerance=tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"placement": "pfeiffer", "dropout": 0.4},
        {"dropout": 0.3, "scaling": -1.7, "activation": "silu"},
        {"bottleneck_size": 1, "scaling": 0.5, "activation": "tanh"},
        {"bottleneck_size": 40, "activation": "gelu", "placement": "pfeiffer"},
    ],
    ids=str,
)
def test_settings_equal_the_formula(settings, training):
    config = BottleneckConfig(**{"bottleneck_size": 6, **settings})
    assert_equals_formula(config, random_run("qa", (4, 6), seed=4, step=2, micro_batch=1), training=training)


@pytest.mark.parametrize("placement", SUBLAYERS)
def test_it_sits_where_hooks_on_transformers_put_it(placement):
    """Behind the whole sublayer, before its output joins the residual stream."""
    hf, model = peft_twin.bases()
    config = BottleneckConfig(bottleneck_size=5, placement=placement, scaling=0.7)
    add_random_adapter(model, "qa", config, seed=4)
    state = {key: weight.clone().requires_grad_() for key, weight in model.adapter_state("qa").items()}

    def behind(layer, sublayer):
        prefix = f"bottleneck.layers.{layer}.{sublayer}.adapter"

        def hook(_, __, output):
            z = output[0] if isinstance(output, tuple) else output
            hidden = (z @ state[f"{prefix}_down.weight"].T + state[f"{prefix}_down.bias"]).relu()
            z = z + 0.7 * (hidden @ state[f"{prefix}_up.weight"].T + state[f"{prefix}_up.bias"])
            return (z, *output[1:]) if isinstance(output, tuple) else z

        return hook

    for i, layer in enumerate(hf.model.layers):
        for sublayer in SUBLAYERS[placement]:
            getattr(layer, sublayer).register_forward_hook(behind(i, sublayer))
    expected, expected_loss = peft_twin.logits_and_loss(hf)
    (output,) = model(fuse(Run("qa", peft_twin.SAMPLES)), return_logits=True)
    backward([output])
    assert_close(output.logits, expected, 1e-4, "logits")
    assert_close(output.loss, expected_loss, 1e-5, "loss")
    for key, gradient in gradients(model, "qa").items():
        assert_close(gradient, state[key].grad, 1e-4, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_it_starts_as_the_identity(activation, dtype):
    model = tiny_model(dtype=dtype).train()
    state = torch.get_rng_state()
    model.add_adapter("qa", BottleneckConfig(activation=activation, dropout=0.5))
    assert torch.equal(torch.get_rng_state(), state)
    run = random_run("qa", (5, 3))
    (output,), found = run_step(model, run)
    (base,) = model(fuse(Run("", run.samples)), return_logits=True)
    assert torch.equal(output.logits, base.logits)
    for key, gradient in found["qa"].items():
        assert gradient.any() == (".adapter_up." in key), key  # what goes up learns first
    for key, weight in model.adapter_state("qa").items():
        bound = 1 / math.sqrt(24)
        assert weight.any() == (".adapter_down." in key), key
        assert weight.abs().max() <= bound
        assert weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_initial_weights_are_a_function_of_seed_and_name():
    drawn = []
    for name, seed in (("qa", 1), ("qa", 1), ("qa", 2), ("other", 1)):
        model = tiny_model()
        model.add_adapter(name, BottleneckConfig(), seed=seed)
        drawn.append(torch.cat([weight.flatten() for weight in model.adapter_state(name).values()]))
    assert [torch.equal(drawn[0], other) for other in drawn[1:]] == [True, False, False]
    layers = [model.adapter_state("other")[f"bottleneck.layers.{i}.mlp.adapter_down.weight"] for i in range(2)]
    assert not torch.equal(*layers)


CONFIGS = {
    "houlsby": BottleneckConfig(bottleneck_size=5, dropout=0.2, activation="gelu"),
    "pfeiffer": BottleneckConfig(bottleneck_size=9, placement="pfeiffer", dropout=0.1, scaling=2.0),
    "low": LoraConfig(r=3, lora_dropout=0.1),
}


def mixed_model(dtype=torch.float32, **config):
    model = tiny_model(tiny_config(**config), dtype=dtype).train()
    for i, (name, adapter) in enumerate(CONFIGS.items()):
        add_random_adapter(model, name, adapter, seed=10 + i)
    return model


RUNS = [random_run(name, (4, 6), seed=i, step=2) for i, name in enumerate(["houlsby", "", "low", "pfeiffer"])]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_fused_equals_solo(order):
    model = mixed_model()
    runs = [RUNS[i] for i in order]
    outputs, fused = run_step(model, *runs)
    for run, output in zip(runs, outputs, strict=True):
        (alone,), solo = run_step(model, run)
        assert_same_output(output, alone, run.adapter_name)
        if run.adapter_name:
            assert_same_gradients(fused[run.adapter_name], solo[run.adapter_name], run.adapter_name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("victim", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("training", [True, False])
def test_a_nan_reaches_no_other_adapter(training, victim, dtype):
    """Also not where a CPU's bfloat16 products read past the end of a row, of 20 features."""
    model = mixed_model(dtype, hidden_size=20, num_attention_heads=2).train(training)
    runs = [RUNS[3], *RUNS]
    outputs, healthy = run_step(model, *runs)
    for weight in model.adapter_state(victim).values():
        weight.fill_(math.nan)
    poisoned, after = run_step(model, *runs)
    for run, before, now in zip(runs, outputs, poisoned, strict=True):
        name = run.adapter_name
        if name == victim:
            assert now.logits.isnan().all()
            continue
        assert torch.equal(before.logits, now.logits), name
        for key, gradient in after.get(name, {}).items():
            assert torch.equal(gradient, healthy[name][key]), key


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_computed_again_changes_no_bit(mode, dtype):
    """With the last layer narrowed to few tokens."""
    runs = [Run(run.adapter_name, run.samples, [[IGNORE] * (len(s) - 1) + s[-1:] for s in run.samples]) for run in RUNS]
    found = []
    for way in ("none", mode):
        model = mixed_model(dtype)
        model.activation_checkpointing_ = way
        outputs = model(fuse(*runs))
        backward(outputs)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([*(output.loss.detach() for output in outputs), *grads])
    assert len(found[0]) == len(found[1]) > 20
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_few_labels_give_the_loss_of_all_logits():
    """Masks do not depend on what the last layer leaves out."""
    model = mixed_model()
    labels = [[IGNORE] * 3 + sample[3:] for sample in RUNS[0].samples]
    run = Run("houlsby", RUNS[0].samples, labels, step=5)
    found = []
    for return_logits in (False, True):
        clear_gradients(model)
        (output,) = model(fuse(run), return_logits=return_logits)
        backward([output])
        found.append((output.loss, gradients(model, "houlsby")))
    assert_close(found[0][0], found[1][0], 1e-6)
    assert_same_gradients(found[0][1], found[1][1], "narrowed")


def test_bfloat16_is_near_float32():
    config = BottleneckConfig(bottleneck_size=5)
    wide, low = tiny_model(), tiny_model(dtype=torch.bfloat16)
    for model in (wide, low):
        add_random_adapter(model, "qa", config, seed=1)
    run = random_run("qa", (6, 4))
    (expected,), wanted = run_step(wide, run)
    (output,), found = run_step(low, run)
    assert_close(output.logits, expected.logits, 0.05)
    for key, gradient in found["qa"].items():
        assert gradient.dtype == torch.float32
        assert_close(gradient, wanted["qa"][key], 0.1, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("placement", SUBLAYERS)
def test_save_and_load_gives_the_same_bits(placement, dtype, tmp_path):
    config = BottleneckConfig(placement=placement, bottleneck_size=3, activation="mish", dropout=0.25, scaling=0.3)
    model, other = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    add_random_adapter(model, "qa", config)
    save_adapter(model, "qa", tmp_path / "qa")
    load_adapter(other, tmp_path / "qa")
    assert other.adapter_config("qa") == config
    run = Run("qa", random_samples((5, 2)))
    outputs = [own(fuse(run), return_logits=True)[0].logits for own in (model, other)]
    assert torch.equal(*outputs)
    assert {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "qa" / WEIGHTS_FILE).items()} == {
        f"bottleneck.layers.{layer}.{sublayer}.{name}": shape
        for layer in range(2)
        for sublayer in SUBLAYERS[placement]
        for name, shape in [
            ("adapter_down.weight", (3, 24)),
            ("adapter_down.bias", (3,)),
            ("adapter_up.weight", (24, 3)),
            ("adapter_up.bias", (24,)),
        ]
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "houlsbi"}, r"placement='houlsbi' must be one of houlsby, pfeiffer; did you mean 'houlsby'\?"),
        ({"activation": "gellu"}, r"activation='gellu' must be one of celu, elu, gelu, .*; did you mean 'gelu'\?"),
        ({"bottleneck_size": 0}, "bottleneck_size=0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1 must be in \[0, 1\)"),
        ({"scaling": 0}, "scaling=0.0 must not be 0"),
        ({"scaling": math.inf}, "scaling=inf must be a finite number"),
    ],
)
def test_refused_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**fields)
