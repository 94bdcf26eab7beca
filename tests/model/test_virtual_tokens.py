"""Virtual tokens in the batch without padding: neighbours, layers computed again, the last layer, and the cache."""

import dataclasses
import math
from typing import ClassVar

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

from moe_peft import (
    LlamaForCausalLM,
    LoraConfig,
    MixLoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RopeScaling,
)
from moe_peft.generation import generate_tokens
from moe_peft.generation.request import Request
from moe_peft.generation.sampling import Sampling
from moe_peft.model.cache import KVCache

LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5}
VIRTUAL = {
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "encoder": PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=7, encoder_dropout=0.2),
    "lstm": PromptEncoderConfig(num_virtual_tokens=4, encoder_dropout=0.2, **LSTM),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "projected": PrefixTuningConfig(num_virtual_tokens=1, prefix_projection=True, encoder_hidden_size=6),
}
NUM_VIRTUAL = {name: config.num_virtual_tokens for name, config in VIRTUAL.items()}
ADAPTERS = {
    **VIRTUAL,
    "low": LoraConfig(r=2, lora_dropout=0.2),
    "mix": MixLoraConfig(r=3, num_experts=5, lora_dropout=0.2, router_jitter_noise=0.1, router_z_loss_coef=0.1),
}
RUNS = {
    "prompt": random_run("prompt", (5, 1, 9), seed=1, step=3),
    "low": random_run("low", (4, 6), seed=7, step=1),
    "prefix": random_run("prefix", (3, 3, 7), seed=3),
    "": random_run("", (6, 2), seed=4),
    "lstm": random_run("lstm", (4,), seed=5, step=2, micro_batch=1),
    "projected": random_run("projected", (1, 8), seed=6),
    "mix": random_run("mix", (4, 4), seed=2, step=1, micro_batch=2),
    "encoder": random_run("encoder", (2, 7), seed=9),
}
ORDERS = [
    list(RUNS),
    ["prefix", "projected", "prompt", "encoder", "lstm", "mix", "low", ""],
    ["", "projected", "low", "prompt", "mix", "prefix", "encoder", "lstm"],
]
CONFIGS = {
    "plain": {},
    "window": {"sliding_window": 3, "mlp_bias": True},
    "dynamic": {
        "rope_scaling": RopeScaling(rope_type="dynamic", factor=2.0),
        "max_position_embeddings": 6,
        "qk_norm": True,
    },
}


def make_model(training: bool = True, dtype: torch.dtype = torch.float32, **config: object) -> LlamaForCausalLM:
    model = tiny_model(tiny_config(**config), dtype=dtype)
    for i, (name, adapter) in enumerate(ADAPTERS.items()):
        add_random_adapter(model, name, adapter, seed=10 + i)
    return model.train(training)


def labelled_from(run: Run, first: int) -> Run:
    """The run with labels from that token of each sample on alone."""
    labels = [[IGNORE] * min(first, len(sample)) + sample[first:] for sample in run.samples]
    return dataclasses.replace(run, labels=labels)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_fused_equals_solo(training, config, order):
    model = make_model(training, **CONFIGS[config])
    outputs, fused = run_step(model, *(RUNS[name] for name in order))
    for name, output in zip(order, outputs, strict=True):
        assert output.logits.shape == (sum(map(len, RUNS[name].samples)), 61)
        (alone,), solo = run_step(model, RUNS[name])
        assert_same_output(output, alone, name)
        if name:
            assert_same_gradients(fused[name], solo[name], name)


@pytest.mark.parametrize("order", ORDERS)
def test_without_logits_the_losses_are_the_same(order):
    """The last layer then answers for the supervised tokens alone."""
    model = make_model(dtype=torch.float64, sliding_window=4)
    for first in (0, 2, 3, 100):
        runs = [labelled_from(RUNS[name], first) for name in order]
        whole, expected = run_step(model, *runs)
        outputs = model(fuse(*runs))
        backward(outputs)
        for run, output, full in zip(runs, outputs, whole, strict=True):
            assert output.num_supervised_tokens == full.num_supervised_tokens
            assert_close(output.loss, full.loss, 1e-12, run.adapter_name)
            for key, gradient in expected.get(run.adapter_name, {}).items():
                found = model.adapter_gradients(run.adapter_name)[key]
                assert_close(found, gradient, 1e-11, f"{run.adapter_name}, {key}")
        clear_gradients(model)


def test_neighbours_of_virtual_tokens_are_as_they_are_beside_none():
    model = make_model(training=False)
    plain = ["low", "", "mix"]
    outputs, found = run_step(model, *(RUNS[name] for name in RUNS))
    beside, expected = run_step(model, *(RUNS[name] for name in plain))
    for name, other in zip(plain, beside, strict=True):
        assert_same_output(outputs[list(RUNS).index(name)], other, name)
        if name:
            assert_same_gradients(found[name], expected[name], name)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("victim", VIRTUAL)
def test_a_nan_reaches_no_other_adapter(victim, poison):
    """In any weight: neighbours keep every bit."""
    runs = [random_run(name, (4, 4), seed=seed, step=2) for seed, name in enumerate(RUNS)]
    for key in make_model().adapter_state(victim):
        model = make_model()
        outputs, healthy = run_step(model, *runs)
        model.adapter_state(victim)[key].view(-1)[0] = poison
        after, poisoned = run_step(model, *runs)
        for run, output, later in zip(runs, outputs, after, strict=True):
            name = run.adapter_name
            if name == victim:
                assert not torch.equal(output.loss, later.loss), key
                continue
            assert torch.equal(later.logits, output.logits), name
            assert torch.equal(later.loss, output.loss), name
            for weight, gradient in poisoned.get(name, {}).items():
                assert torch.equal(gradient, healthy[name][weight]), f"{name}, {weight}"


def test_each_loss_reaches_its_own_adapter_alone():
    model = make_model()
    for name in VIRTUAL:
        clear_gradients(model)
        outputs = model(fuse(*RUNS.values()))
        next(output for output in outputs if output.adapter_name == name).loss.backward()
        for other in ADAPTERS:
            found = [gradient for gradient in model.adapter_gradients(other).values() if gradient is not None]
            assert any(gradient.any() for gradient in found) == (other == name), (name, other)


@pytest.mark.parametrize("name", VIRTUAL)
def test_one_adapter_in_two_runs(name):
    model = make_model(training=False)
    first, second = random_run(name, (4, 2), seed=8), random_run(name, (5,), seed=9)
    outputs, fused = run_step(model, first, RUNS[""], second)
    (left,), left_grads = run_step(model, first)
    (right,), right_grads = run_step(model, second)
    assert_same_output(outputs[0], left, "first")
    assert_same_output(outputs[2], right, "second")
    both = {key: gradient + right_grads[name][key] for key, gradient in left_grads[name].items()}
    assert_same_gradients(fused[name], both, "both")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_bit(mode, dtype, config):
    model = make_model(dtype=dtype, **{"num_hidden_layers": 3, **CONFIGS[config]})
    for runs in ([labelled_from(run, 3) for run in RUNS.values()], [RUNS["prefix"]], [RUNS["lstm"]]):
        found = {}
        for way in ("none", mode):
            model.activation_checkpointing_ = way
            outputs = model(fuse(*runs))
            backward(outputs)
            found[way] = [output.loss.detach() for output in outputs]
            found[way] += [weight.grad for weight in model.parameters() if weight.grad is not None]
            clear_gradients(model)
        assert len(found[mode]) == len(found["none"])
        for one, other in zip(found[mode], found["none"], strict=True):
            assert torch.equal(one, other)
            assert one.isfinite().all()


def test_a_bfloat16_base_keeps_float32_adapters():
    model, wide = make_model(False, torch.bfloat16), make_model(False)
    with torch.no_grad():
        for weight, rounded in zip(wide.parameters(), model.parameters(), strict=True):
            weight.copy_(rounded)
    outputs, found = run_step(model, *RUNS.values())
    truth, expected = run_step(wide, *RUNS.values())
    for output, true in zip(outputs, truth, strict=True):
        assert output.logits.dtype == torch.bfloat16
        assert_relative(output.logits, true.logits, 0.05, output.adapter_name)
    for name in VIRTUAL:
        for key, gradient in found[name].items():
            assert gradient.dtype == torch.float32
            total = torch.stack([wanted.norm() for wanted in expected[name].values()]).norm().item()
            assert_relative(gradient, expected[name][key], 0.1, f"{name}, {key}", floor=0.1 * total)


def new_cache(model: LlamaForCausalLM, num_samples: int, capacity: int = 20) -> KVCache:
    return KVCache(model.config_, num_samples, capacity, dtype=model.dtype, device=model.device)


@pytest.mark.parametrize("config", ["plain", "window"])  # stretched keys stay in a cache as they went in
def test_the_cache_gives_the_logits_of_the_whole(config):
    """A prompt in pieces, then token by token; virtual tokens come once, before the first piece."""
    model = make_model(False, torch.float64, **CONFIGS[config])
    names = [*RUNS, "prompt", "prefix"]
    names.sort(key=list(RUNS).index)
    samples = random_samples([8] * len(names), seed=3)
    cuts = [[0, 1 + i % 4, 5, *range(6, 9)] for i in range(len(names))]
    cache = new_cache(model, len(names))
    found = [[] for _ in names]
    with torch.no_grad():
        for part in range(len(cuts[0]) - 1):
            runs = [
                Run(name, [sample[cut[part] : cut[part + 1]]])
                for name, sample, cut in zip(names, samples, cuts, strict=True)
            ]
            outputs = model(fuse(*runs, with_labels=False), cache=cache)
            for rows, output in zip(found, outputs, strict=True):
                rows.append(output.logits)
        for name, sample, rows in zip(names, samples, found, strict=True):
            (whole,) = model(fuse(Run(name, [sample]), with_labels=False))
            assert_close(torch.cat(rows), whole.logits, 1e-11, name)
    assert cache.lengths_ == [8 + NUM_VIRTUAL.get(name, 0) for name in names]


def test_samples_may_begin_beside_others_that_go_on():
    """Two of one adapter, one with a filled cache, one with an empty one."""
    model = make_model(False, torch.float64)
    first, second = random_samples((6, 4), seed=4)
    for name in VIRTUAL:
        cache = new_cache(model, 1)
        with torch.no_grad():
            model(fuse(Run(name, [first[:3]]), with_labels=False), cache=cache)
            grown = new_cache(model, 2)
            for layer in range(len(model.layers)):
                grown.keys_[layer][0], grown.values_[layer][0] = cache.keys_[layer][0], cache.values_[layer][0]
            grown.lengths_[0] = cache.lengths_[0]
            (output,) = model(fuse(Run(name, [first[3:], second]), with_labels=False), cache=grown)
            (one,) = model(fuse(Run(name, [first]), with_labels=False))
            (two,) = model(fuse(Run(name, [second]), with_labels=False))
        assert_close(output.logits, torch.cat([one.logits[3:], two.logits]), 1e-11, name)


def test_the_last_logits_are_those_of_the_last_tokens():
    model = make_model(False)
    with torch.no_grad():
        outputs = model(fuse(*RUNS.values(), with_labels=False))
        lasts = model(fuse(*RUNS.values(), with_labels=False), last_logits_only=True)
    for run, output, last in zip(RUNS.values(), outputs, lasts, strict=True):
        ends = torch.tensor([len(sample) for sample in run.samples]).cumsum(0) - 1
        assert_close(last.logits, output.logits[ends], 1e-6, run.adapter_name)


@pytest.mark.parametrize("name", VIRTUAL)
def test_a_cache_too_small_for_the_virtual_tokens_is_refused(name):
    model = make_model(False)
    run = fuse(Run(name, [[1, 2, 3]]), with_labels=False)
    with torch.no_grad(), pytest.raises(ValueError, match="but the cache holds"):
        model(run, cache=new_cache(model, 1, NUM_VIRTUAL[name] + 2))
    if name == "prefix":
        with torch.no_grad(), pytest.raises(ValueError, match="sample 0 begins with 3 tokens, but the cache holds 2"):
            model(run, cache=new_cache(model, 1, 2))
    with torch.no_grad():
        model(run, cache=new_cache(model, 1, NUM_VIRTUAL[name] + 3))


class Numbers:
    """A tokenizer without text."""

    eos_token_ids = ()
    special_ids: ClassVar[dict[str, int]] = {}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def test_answers_are_those_of_the_model_without_a_cache():
    """Rows of everyone in one batch, which leave it one after another."""
    model = make_model(dtype=torch.float64)
    requests = [
        Request(prompt_ids=tuple(prompt), adapter_name=name, max_new_tokens=3 + i % 3, sampling=Sampling())
        for i, (prompt, name) in enumerate(zip(random_samples([5, 1, 9, 3, 7, 2, 4, 6]), RUNS, strict=True))
    ]
    completions = generate_tokens(model, Numbers(), requests)
    model.eval()
    for request, completion in zip(requests, completions, strict=True):
        ids = list(request.prompt_ids)
        for _ in range(request.max_new_tokens):
            with torch.no_grad():
                (output,) = model(fuse(Run(request.adapter_name, [ids]), with_labels=False))
            ids.append(int(output.logits[-1].argmax()))
        assert list(completion.token_ids) == ids[len(request.prompt_ids) :], request.adapter_name


@pytest.mark.parametrize("name", ["", *VIRTUAL])
def test_the_context_counts_them(name):
    """The longest answer still fits, one token more is refused."""
    model = make_model(False, max_position_embeddings=16)
    room = 16 - 4 - NUM_VIRTUAL.get(name, 0)
    generate_tokens(model, Numbers(), [Request(prompt_ids=(1, 2, 3, 4), adapter_name=name, max_new_tokens=room)])
    behind = f" behind {NUM_VIRTUAL[name]} virtual tokens" if name else ""
    message = f"max_new_tokens={room + 1} and a prompt of 4{behind} must come to at most 16 tokens"
    with pytest.raises(ValueError, match=message):
        generate_tokens(
            model, Numbers(), [Request(prompt_ids=(1, 2, 3, 4), adapter_name=name, max_new_tokens=room + 1)]
        )


@pytest.mark.parametrize("name", VIRTUAL)
def test_removed_they_leave_nothing(name):
    model = make_model(False)
    model.remove_adapter(name)
    assert not any(name in key.split(".") for key, _ in model.named_parameters())
    with pytest.raises(ValueError, match=f"adapter '{name}' is not attached"):
        model(fuse(RUNS[name]))
