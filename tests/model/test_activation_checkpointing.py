"""What is computed again in backward changes no bit, and less is kept for it."""

import itertools
import weakref

import pytest
import torch
from builders import (
    IGNORE,
    Run,
    add_random_adapter,
    backward,
    clear_gradients,
    fuse,
    random_run,
    random_samples,
    tiny_config,
    tiny_model,
)

from moe_peft import LoraConfig, MixLoraConfig, ops
from moe_peft.model import decoder
from moe_peft.model.llama import ACTIVATION_CHECKPOINTING

ADAPTERS = {
    "low": LoraConfig(r=2, lora_dropout=0.2),
    "some": LoraConfig(r=5, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"]),
    "mix": MixLoraConfig(
        r=3, num_experts=5, top_k=2, lora_dropout=0.2, router_z_loss_coef=0.1, router_jitter_noise=0.1
    ),
    "switch": MixLoraConfig(r=4, num_experts=3, top_k=1, target_modules=["o_proj", "gate_proj"]),
}
RECOMPUTING = [mode for mode in ACTIVATION_CHECKPOINTING if mode != "none"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def supervised_behind(run, first):
    """The run with labels from that token of each sample on alone."""
    labels = [[IGNORE] * min(first, len(sample)) + sample[first:] for sample in run.samples]
    return Run(run.adapter_name, run.samples, labels, run.step, run.micro_batch)


RUNS = [
    supervised_behind(random_run("low", (7, 1, 9), seed=1, step=3), 4),
    random_run("mix", (4, 6), seed=2, step=1, micro_batch=2),
    random_run("", (6, 2), seed=3),
    supervised_behind(random_run("switch", (8, 7), seed=5), 5),
    random_run("moe.mix.experts.1", (5,), seed=6),
    random_run("some", (3,), seed=7).unlabelled(),
]


def make_model(dtype=torch.float32, **config):
    model = tiny_model(tiny_config(num_hidden_layers=3, **config), dtype=dtype)
    for i, (name, adapter) in enumerate(ADAPTERS.items()):
        add_random_adapter(model, name, adapter, seed=10 + i)
    return model.train()


def step(model, mode, runs):
    """Every number of one training step in that mode, by name."""
    model.activation_checkpointing_ = mode
    clear_gradients(model)
    outputs = model(fuse(*runs))
    backward(outputs)
    found = {}
    for i, output in enumerate(outputs):
        found |= {f"{i}: loss": output.loss.detach(), f"{i}: aux loss": output.aux_loss.detach()}
        found |= {f"{i}: router logits, layer {j}": logits for j, logits in enumerate(output.router_logits or ())}
    found |= {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    clear_gradients(model)
    return found


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
        assert value.isfinite().all(), key


@pytest.mark.parametrize("config", [{}, {"sliding_window": 3, "qk_norm": True, "attention_bias": True}])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", RECOMPUTING)
def test_no_bit_changes(mode, dtype, config):
    model = make_model(dtype, **config)
    for runs in (RUNS, RUNS[:1], RUNS[1:2], [run.unlabelled() for run in RUNS]):
        expected = step(model, "none", runs)
        assert_same_bits(step(model, mode, runs), expected)


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_draws_take_part(mode):
    """The bits above would say little if nothing were dropped: another step gives other losses."""
    model = make_model()
    first = step(model, mode, RUNS[:2])
    later = [Run(run.adapter_name, run.samples, run.labels, run.step + 1, run.micro_batch) for run in RUNS[:2]]
    second = step(model, mode, later)
    assert all(not torch.equal(first[f"{i}: loss"], second[f"{i}: loss"]) for i in range(2))


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_two_forwards_before_one_backward(mode):
    """Gradient accumulation may leave several batches waiting."""
    found = {}
    for way in ("none", mode):
        model = make_model()
        model.activation_checkpointing_ = way
        outputs = [*model(fuse(*RUNS)), *model(fuse(*RUNS[::-1]))]
        backward(outputs)
        found[way] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert_same_bits(found[mode], found["none"])


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_a_backward_for_each_adapter(mode):
    found = {}
    for way in ("none", mode):
        model = make_model()
        model.activation_checkpointing_ = way
        outputs = model(fuse(*RUNS))
        for output in outputs:
            (output.loss + output.aux_loss).backward(retain_graph=True)
        found[way] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert_same_bits(found[mode], found["none"])


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_random_state_is_neither_used_nor_changed(mode):
    model = make_model()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = step(model, mode, RUNS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_same_bits(step(model, mode, RUNS), first)


def kept_bytes(model, mode, runs):
    """Bytes of the distinct storages that live for backward once a forward is done, weights aside."""
    model.activation_checkpointing_ = mode
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []

    def keep(tensor):
        kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(fuse(*runs))
    storages = [tensor().untyped_storage() for tensor in kept if tensor() is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in weights}
    assert outputs[0].loss.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("runs", [RUNS, RUNS[:1], RUNS[1:2]], ids=["mixed", "LoRA", "mixture"])
def test_each_mode_keeps_less_than_the_one_before(runs, dtype):
    model = make_model(dtype)
    nothing, selective, full = (kept_bytes(model, mode, runs) for mode in ("none", "selective", "full"))
    assert nothing > selective > full


@pytest.mark.parametrize("name", ["low", "mix"])
def test_full_keeps_a_layers_input_and_selective_attention_beside_it(name):
    """Bytes that one more layer costs, in tensors of a token's features."""
    lengths = (40, 60)
    runs = [Run(name, random_samples(lengths, seed=1))]
    costs = {}
    for mode in ACTIVATION_CHECKPOINTING:
        sizes = []
        for num_layers in (2, 3):
            model = tiny_model(tiny_config(num_hidden_layers=num_layers))
            add_random_adapter(model, name, ADAPTERS[name])
            sizes.append(kept_bytes(model.train(), mode, runs))
        costs[mode] = (sizes[1] - sizes[0]) / (4 * sum(lengths) * 24)
    # A mixture's aux loss keeps its router's logits and what becomes of them, [T, E] each.
    routing = 4 * ADAPTERS[name].num_experts / 24 if name == "mix" else 0
    assert 1 <= costs["full"] <= 1.05 + routing
    # x, q, k, v and the mixed values: 24 + 24 + 12 + 12 + 24 features.
    assert 3 <= costs["selective"] <= 4.05 + routing
    assert costs["none"] > 2 * costs["selective"]


@pytest.mark.parametrize(("mode", "calls"), [("none", 1), ("selective", 1), ("full", 2)])
@pytest.mark.parametrize("labels", ["everything", "answers"])
def test_how_often_attention_runs(labels, mode, calls, monkeypatch):
    model = make_model()
    model.activation_checkpointing_ = mode
    counts = {"causal_attention": 0, "suffix_attention": 0}

    def counting(name, function):
        def call(*arguments):
            counts[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(ops, "causal_attention", counting("causal_attention", ops.causal_attention))
    monkeypatch.setattr(decoder, "suffix_attention", counting("suffix_attention", decoder.suffix_attention))
    whole = Run("low", random_samples((7, 9), seed=1))
    backward(model(fuse(whole if labels == "everything" else supervised_behind(whole, 4))))
    narrowed = labels == "answers"
    assert counts == {
        "causal_attention": calls * (2 if narrowed else 3),
        "suffix_attention": calls if narrowed else 0,
    }


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_evaluation_and_no_grad_compute_once(mode, monkeypatch):
    model = make_model()
    model.activation_checkpointing_ = mode
    monkeypatch.setattr(decoder, "checkpoint", lambda *_, **__: pytest.fail("nothing is computed again"))
    with torch.no_grad():
        model(fuse(*RUNS))
    with torch.inference_mode():
        model(fuse(*RUNS))
    model.eval()
    outputs = model(fuse(*RUNS))
    backward(outputs)  # a gradient in eval mode, without draws
    with pytest.raises(pytest.fail.Exception):
        model.train()(fuse(*RUNS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", RECOMPUTING)
def test_evaluation_keeps_every_bit(mode, dtype):
    model = make_model(dtype).eval()
    with torch.no_grad():
        results = []
        for way in ("none", mode):
            model.activation_checkpointing_ = way
            results.append(model(fuse(*RUNS), return_logits=True))
    for own, other in zip(*results, strict=True):
        assert torch.equal(own.logits, other.logits)
        assert torch.equal(own.loss, other.loss)


@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("victim", ["low", "mix"])
def test_nan_stays_with_its_adapter(victim, mode):
    model = make_model()
    healthy = step(model, mode, RUNS)
    own = {id(parameter) for parameter in model.adapter_parameters(victim)}
    for parameter in model.adapter_parameters(victim):
        parameter.data.fill_(torch.nan)
    sick = step(model, mode, RUNS)
    names = {key for key, parameter in model.named_parameters() if id(parameter) in own}
    victims = [i for i, run in enumerate(RUNS) if victim in run.adapter_name]
    others = [key for key in healthy if key not in names and not key.startswith(tuple(f"{i}:" for i in victims))]
    assert len(others) > 20
    for key in others:
        assert torch.equal(sick[key], healthy[key]), key
    assert sick[f"{victims[0]}: loss"].isnan()


@pytest.mark.parametrize(("left", "right"), list(itertools.combinations(ACTIVATION_CHECKPOINTING, 2)))
def test_the_mode_may_change_between_steps(left, right):
    """A mode is read by each forward; a backward follows the forward it belongs to."""
    model = make_model()
    expected = step(model, "none", RUNS)
    model.activation_checkpointing_ = left
    clear_gradients(model)
    outputs = model(fuse(*RUNS))
    model.activation_checkpointing_ = right
    backward(outputs)
    for key, parameter in model.named_parameters():
        if key in expected:
            assert torch.equal(parameter.grad, expected[key]), key
