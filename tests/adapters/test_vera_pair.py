"""VeRA's frozen pair: drawn as the real peft draws it, there once, free of other adapters, gone with its last user."""

import gc
import weakref

import peft
import peft_twin
import pytest
import torch
from builders import (
    Run,
    add_random_adapter,
    assert_close,
    backward,
    fuse,
    random_run,
    random_samples,
    tiny_config,
    tiny_model,
)

from moe_peft import VeraConfig, load_adapter, save_adapter
from moe_peft.adapters.lora import PROJECTIONS, target_linears
from moe_peft.adapters.vera import VeraProjections

SETTINGS = {
    "all": {"r": 5, "target_modules": list(PROJECTIONS)},
    "another key": {"r": 3, "projection_prng_key": 7, "target_modules": ["q_proj", "down_proj"]},
    "one layer": {"r": 4, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
    "o_proj": {"r": 2, "target_modules": ["o_proj"]},
}


def projections(model):
    return [module for module in model.modules() if isinstance(module, VeraProjections)]


def drawn_pair(model):
    (found,) = projections(model)
    return found.vera_A, found.vera_B


def vera_of(model, name):
    """What the adapter has on the first projection that carries it."""
    return next(linear.loras_[name] for _, _, linear in target_linears(model, PROJECTIONS) if name in linear.loras_)


@pytest.mark.parametrize("case", ["all", "another key", "one layer", "o_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_drawn_pair_equals_pefts_to_the_bit(case, dtype):
    hf, model = peft_twin.bases(dtype=dtype)
    theirs = peft.get_peft_model(hf, peft.VeraConfig(**SETTINGS[case])).base_model
    model.add_adapter("other", VeraConfig(r=9, projection_prng_key=1))
    model.add_adapter("qa", VeraConfig(**SETTINGS[case]))
    model.remove_adapter("other")  # whoever else is there, the draw is the same
    vera_a, vera_b = drawn_pair(model)
    assert vera_a.dtype == vera_b.dtype == dtype
    assert torch.equal(vera_a.float(), theirs.vera_A["default"].float())
    assert torch.equal(vera_b.float(), theirs.vera_B["default"].float())


def test_a_pair_that_was_drawn_elsewhere_stays_with_its_adapters(tmp_path):
    hf, model = peft_twin.bases()
    model.add_adapter("drawn", VeraConfig(**SETTINGS["all"]))
    before = [tensor.clone() for tensor in drawn_pair(model)]
    theirs = peft.get_peft_model(hf, peft.VeraConfig(task_type="CAUSAL_LM", **SETTINGS["all"]))
    with torch.no_grad():
        theirs.base_model.vera_A["default"].mul_(0.7)
        for name, weight in theirs.named_parameters():
            if "vera_lambda" in name:
                weight.copy_(torch.linspace(-0.4, 0.5, weight.numel()))
    theirs.save_pretrained(str(tmp_path / "qa"))
    for name in ("foreign", "twice"):
        load_adapter(model, tmp_path / "qa", name)
    model.add_adapter("later", VeraConfig(**SETTINGS["all"]))
    by_adapter = {name: vera_of(model, name).projections_ for name in model.adapter_names}
    assert by_adapter["drawn"] is by_adapter["later"]
    assert by_adapter["foreign"] is by_adapter["twice"]
    assert len(projections(model)) == 2
    assert all(torch.equal(*tensors) for tensors in zip(before, by_adapter["drawn"].buffers(), strict=True))
    with torch.no_grad():
        assert_close(peft_twin.our_logits(model, "foreign"), peft_twin.logits(theirs), 1e-4)
    save_adapter(model, "foreign", tmp_path / "again")
    load_adapter(model, tmp_path / "again")
    assert torch.equal(peft_twin.our_logits(model, "again"), peft_twin.our_logits(model, "foreign"))
    assert len(projections(model)) == 2


def test_adapters_of_one_key_hold_the_pair_once():
    """In bytes: one pair of float32 for as many adapters and layers as there are."""
    model = tiny_model(tiny_config(num_hidden_layers=3))
    parameters = sum(weight.nbytes for weight in model.parameters())
    for name in ("a", "b", "c"):
        model.add_adapter(name, VeraConfig(r=16))
    storages = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in model.buffers()}
    assert sum(storages.values()) == 4 * 16 * (38 + 38)
    vectors = 3 * 3 * (7 * 16 + 24 + 12 + 12 + 24 + 38 + 38 + 24)
    assert sum(weight.nbytes for weight in model.parameters()) == parameters + 4 * vectors
    assert not any("vera_A" in key for key in model.state_dict())
    # Another rank, key or widest projection is another pair.
    for i, config in enumerate(
        [{"r": 8}, {"r": 16, "projection_prng_key": 1}, {"r": 16, "target_modules": ["q_proj"]}]
    ):
        model.add_adapter(f"other-{i}", VeraConfig(**config))
        assert len(projections(model)) == 2 + i
    wide = {name: vera_of(model, name).projections_ for name in "abc"}
    model.double()
    assert {id(vera_of(model, name).projections_) for name in "abc"} == {id(pair) for pair in wide.values()}
    assert len({buffer.data_ptr() for buffer in model.buffers()}) == 8
    assert all(buffer.dtype == torch.float64 for buffer in model.buffers())


def kept_for_backward(rank, run):
    """Bytes of the distinct storages that a forward keeps, weights and the pair aside."""
    model = tiny_model().train()
    add_random_adapter(model, "qa", VeraConfig(r=rank))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(fuse(run))
    assert outputs[0].loss.requires_grad
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in own)


def test_a_step_copies_one_side_of_the_pair():
    """What a rank costs: a column of B for each projection, and a number for each token and projection."""
    run = Run("qa", random_samples((5, 4)))
    cost = (kept_for_backward(64, run) - kept_for_backward(32, run)) / 32
    outputs = 24 + 12 + 12 + 24 + 38 + 38 + 24
    assert cost <= 4 * 2 * (outputs + 7 * 9)


def test_the_pair_goes_with_its_last_user():
    model = tiny_model()
    for name in ("a", "b"):
        model.add_adapter(name, VeraConfig(r=4))
    pair = weakref.ref(projections(model)[0])
    model.remove_adapter("a")
    gc.collect()
    assert pair() is not None
    model.remove_adapter("b")
    gc.collect()
    assert pair() is None
    assert list(model.buffers()) == []


def test_an_adapter_that_does_not_fit_leaves_nothing_behind():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"layers_to_transform has 2, which must be in 0..1: num_hidden_layers=2"):
        model.add_adapter("qa", VeraConfig(layers_to_transform=[0, 2]))
    assert projections(model) == []
    assert model.adapter_names == []


def test_the_pair_is_not_trained():
    model = tiny_model().train()
    add_random_adapter(model, "qa", VeraConfig(r=4))
    before = [tensor.clone() for tensor in drawn_pair(model)]
    backward(model(fuse(random_run("qa", (5, 3)))))
    assert {id(weight) for weight in model.parameters() if weight.grad is not None} == {
        id(weight) for weight in model.adapter_parameters("qa")
    }
    assert all(weight.dim() == 1 for weight in model.adapter_parameters("qa"))
    torch.optim.SGD(model.adapter_parameters("qa"), lr=1.0).step()
    assert all(torch.equal(*tensors) for tensors in zip(before, drawn_pair(model), strict=True))
