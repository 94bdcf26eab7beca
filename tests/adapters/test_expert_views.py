"""Expert and adapter views show the live weights; adapters come and go without a trace."""

import copy

import pytest
import torch
from builders import Run, add_random_adapter, fuse, random_run, random_samples, run_step, tiny_config, tiny_model
from torch import nn

from moe_peft import LoraConfig, MixLoraConfig
from moe_peft.model.batch import ADAPTER_NAME
from moe_peft.model.linear import AdapterDict

MIX = MixLoraConfig(r=2, num_experts=3, top_k=2)


@pytest.fixture
def model():
    model = tiny_model()
    add_random_adapter(model, "qa", MIX, seed=1)
    add_random_adapter(model, "plain", LoraConfig(r=3), seed=2)
    return model


def logits(model, name):
    with torch.no_grad():
        (output,) = model(fuse(Run(name, random_samples((5, 2))), with_labels=False))
    return output.logits


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_experts_are_views_of_the_stack(model, projection):
    mlp = model.layers[1].mlp
    stack = mlp.moes_["qa"].stack_of(projection)
    for expert in range(3):
        lora = getattr(mlp, projection).loras_[f"moe.qa.experts.{expert}"]
        for factor in ("lora_A", "lora_B"):
            view, whole = getattr(lora, factor), getattr(stack, factor)
            assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert torch.equal(view, whole[expert])
    before = logits(model, "qa")
    with torch.no_grad():
        for expert in range(3):
            getattr(mlp, projection).loras_[f"moe.qa.experts.{expert}"].lora_B.add_(1.0)
    assert torch.equal(stack.lora_B, whole)
    assert not torch.equal(logits(model, "qa"), before)


def test_names_of_the_views(model):
    linear = model.layers[0].mlp.up_proj
    assert list(linear.loras_) == ["moe.qa.experts.0", "moe.qa.experts.1", "moe.qa.experts.2", "plain"]
    assert "moe.qa.experts.1" in linear.loras_
    assert "moe.qa.experts.3" not in linear.loras_
    assert len(linear.loras_) == 4
    with pytest.raises(KeyError, match=r"moe\.qa\.experts\.3"):
        linear.loras_["moe.qa.experts.3"]
    assert list(model.layers[0].self_attn.q_proj.loras_) == ["qa", "plain"]
    assert list(model.layers[0].mlp.moes_) == ["qa"]


def test_stacks_are_the_parameters(model):
    """One parameter a projection and layer, each once, and all of them in ``model.parameters()``."""
    own = model.adapter_parameters("qa")
    assert len(own) == 2 * (1 + 3 * 2 + 4 * 2)  # layers x (router + expert stacks + attention factors)
    assert len({id(parameter) for parameter in own}) == len(own)
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in own)
    assert (3, 2, 24) in {tuple(parameter.shape) for parameter in own}
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    both = own + model.adapter_parameters("plain")
    assert trainable == {id(parameter) for parameter in both}
    assert sum(weight.numel() for weight in model.adapter_state("qa").values()) == sum(p.numel() for p in own)


@pytest.mark.parametrize("name", ["qa", "plain"])
def test_state_names(model, name):
    shapes = {key: tuple(weight.shape) for key, weight in model.adapter_state(name).items()}
    if name == "qa":
        assert shapes["mixlora.layers.1.mlp.moe_gate.weight"] == (3, 24)
        assert shapes["mixlora.layers.0.mlp.down_proj.experts.2.lora_A.weight"] == (2, 38)
        assert shapes["mixlora.layers.0.mlp.down_proj.experts.2.lora_B.weight"] == (24, 2)
        assert shapes["mixlora.layers.0.self_attn.k_proj.lora_B.weight"] == (12, 2)
        assert len(shapes) == 2 * (1 + 3 * 3 * 2 + 4 * 2)
    else:
        assert shapes["base_model.model.model.layers.1.mlp.gate_proj.lora_A.weight"] == (3, 24)
        assert shapes["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"] == (24, 3)
        assert len(shapes) == 2 * 7 * 2
    assert model.adapter_gradients(name).keys() == shapes.keys()
    assert all(gradient is None for gradient in model.adapter_gradients(name).values())


@pytest.mark.parametrize("name", ["qa", "plain"])
def test_every_state_edit_in_place_changes_the_outputs(model, name):
    for key, weight in model.adapter_state(name).items():
        before = logits(model, name)
        other = logits(model, "")
        saved = weight.clone()
        weight.mul_(-3.0)
        assert not torch.equal(logits(model, name), before), key
        assert torch.equal(logits(model, ""), other), key
        weight.copy_(saved)
        assert torch.equal(logits(model, name), before), key


def test_gradient_views_are_live(model):
    outputs = model(fuse(random_run("qa", (6, 3))))
    (outputs[0].loss + outputs[0].aux_loss).backward()
    for view in model.adapter_gradients("qa").values():
        view.fill_(2.5)
    assert all((parameter.grad == 2.5).all() for parameter in model.adapter_parameters("qa"))


def test_conversions_keep_the_views(model):
    """``to`` swaps the stack's storage, a deep copy makes a new one: the views must follow."""
    for twin in (copy.deepcopy(model), copy.deepcopy(model).double()):
        with torch.no_grad():
            twin.layers[0].mlp.up_proj.loras_["moe.qa.experts.0"].lora_A.fill_(9.0)
        assert (twin.adapter_state("qa")["mixlora.layers.0.mlp.up_proj.experts.0.lora_A.weight"] == 9.0).all()
        assert (twin.layers[0].mlp.moes_["qa"].stack_of("up_proj").lora_A[0] == 9.0).all()
    assert (model.layers[0].mlp.up_proj.loras_["moe.qa.experts.0"].lora_A != 9.0).any()


def test_state_dict_round_trip(model):
    twin = tiny_model(seed=5)
    twin.add_adapter("qa", MIX)
    twin.add_adapter("plain", LoraConfig(r=3))
    twin.load_state_dict(model.state_dict())
    for name in ("", "qa", "plain"):
        assert torch.equal(logits(twin, name), logits(model, name))


def test_removal_leaves_no_trace():
    model = tiny_model()
    names = [name for name, _ in model.named_modules()]
    keys = list(model.state_dict())
    base = logits(model, "")
    add_random_adapter(model, "plain", LoraConfig(r=3))
    before = logits(model, "plain")
    add_random_adapter(model, "qa", MIX)
    add_random_adapter(model, "qa2", MIX)
    model.remove_adapter("qa")
    assert model.adapter_names == ["plain", "qa2"]
    assert torch.equal(logits(model, "plain"), before)
    model.remove_adapter("qa2")
    model.remove_adapter("plain")
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, ""), base)
    assert model.adapter_names == []


def test_a_failed_attach_leaves_no_trace():
    class Broken(MixLoraConfig):
        def attach(self, model, name, seed, tokenizer=None):
            super().attach(model, name, seed)
            raise RuntimeError("half way")

    model = tiny_model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(RuntimeError, match="half way"):
        model.add_adapter("qa", Broken(r=2))
    assert [name for name, _ in model.named_modules()] == names
    assert model.adapter_names == []
    model.add_adapter("qa", MIX)


@pytest.mark.parametrize(
    "name", ["eval", "train", "type", "keys", "get", "forward", "training", "half", "_modules", "0"]
)
@pytest.mark.parametrize("config", [LoraConfig(r=2), MIX], ids=["lora", "mixlora"])
def test_every_valid_name_works(name, config):
    """Names of ``nn.Module``'s own attributes are names like any other."""
    assert ADAPTER_NAME.fullmatch(name)
    model = tiny_model(tiny_config(num_hidden_layers=1))
    add_random_adapter(model, name, config)
    _, found = run_step(model.train(), random_run(name, (4, 2)))
    assert found[name]
    twin = copy.deepcopy(model).eval()
    assert torch.equal(logits(twin, name), logits(model.eval(), name))
    assert any(isinstance(module, AdapterDict) and name in module for module in model.modules())
    model.remove_adapter(name)
    assert model.adapter_names == []


@pytest.mark.parametrize("name", ["", "a.b", "moe.qa.experts.0", "a b", "a/b", "é", "a\n"])
def test_other_names_are_refused(model, name):
    with pytest.raises(ValueError, match="must consist of letters, digits"):
        model.add_adapter(name, LoraConfig(r=2))


def test_taken_and_unknown_names(model):
    with pytest.raises(ValueError, match="'qa' is taken already"):
        model.add_adapter("qa", LoraConfig(r=2))
    for call in (model.remove_adapter, model.adapter_state, model.adapter_gradients, model.adapter_parameters):
        with pytest.raises(ValueError, match="'plane' is not attached to this model; did you mean 'plain'"):
            call("plane")
    with pytest.raises(ValueError, match="none is attached"):
        tiny_model().remove_adapter("qa")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qb", "'qb' is not attached to this model; valid here: plain, qa"),
        ("moe.qa.experts.3", "'qa' has no expert 'moe.qa.experts.3'"),
        ("moe.qa.experts.00", "moe.qa.experts.00"),
        ("moe.plain.experts.0", "'plain' has no expert"),
        ("moe.nobody.experts.0", "'nobody' is not attached"),
    ],
)
def test_batches_for_nobody_are_refused(model, name, message):
    with pytest.raises(ValueError, match=message):
        model(fuse(Run(name, [[1, 2]])))


@pytest.mark.parametrize("label", [61, -1, -99])
def test_labels_outside_the_vocabulary_are_refused(model, label):
    with pytest.raises(ValueError, match=r"labels must be -100 or in 0..vocab_size-1=60"):
        model(fuse(Run("", [[1, 2]], [[1, label]])))
