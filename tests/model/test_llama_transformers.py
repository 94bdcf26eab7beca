"""Logits and losses of every base-model option equal transformers'."""

import pytest
import torch
from builders import VOCAB, Run, assert_close, fuse, random_samples
from hf_twin import ExactRotary, hf_model, twin_of

from moe_peft import LlamaConfig, LlamaForCausalLM, RopeScaling

# Past every trained context below (16 or 32 tokens); equal neighbours share an attention call, one token has no past.
LENGTHS = (70, 9, 9, 1, 45)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def rope(kind, **fields):
    return {"rope_type": kind, "rope_theta": 10000.0, **fields}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
RAMP = {**YARN, "beta_fast": 3.0, "beta_slow": 0.4}  # from pair 0.92 to pair 4.43 of a head of 32: both ends round

# name: (family, changed transformers settings, changed settings of ours)
CASES = {
    "plain": ("llama", {}, {}),
    "multi_head": ("llama", {"num_key_value_heads": 4}, {"num_key_value_heads": None}),
    "multi_query": ("llama", {"num_key_value_heads": 1}, {"num_key_value_heads": 1}),
    "one_head": (
        "llama",
        {"num_attention_heads": 1, "num_key_value_heads": 1},
        {"num_attention_heads": 1, "num_key_value_heads": 1},
    ),
    "head_dim_wider": ("llama", {"head_dim": 20}, {"head_dim": 20}),
    "head_dim_narrower": ("llama", {"head_dim": 6}, {"head_dim": 6}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "attention_bias": ("llama", {"attention_bias": True}, {"attention_bias": True}),
    "mlp_bias": ("llama", {"mlp_bias": True}, {"mlp_bias": True}),
    "eps": ("llama", {"rms_norm_eps": 0.1}, {"rms_norm_eps": 0.1}),
    "theta": ("llama", {"rope_parameters": rope("default", rope_theta=500.0)}, {"rope_theta": 500.0}),
    "linear": (
        "llama",
        {"rope_parameters": rope("linear", factor=3.0)},
        {"rope_scaling": RopeScaling(rope_type="linear", factor=3.0)},
    ),
    "llama3": (
        "llama",
        {"rope_parameters": rope("llama3", **LLAMA3)},
        {"rope_scaling": RopeScaling(rope_type="llama3", **LLAMA3)},
    ),
    "llama3_bands": (
        "llama",
        {"head_dim": 32, "rope_parameters": rope("llama3", **{**LLAMA3, "low_freq_factor": 0.5})},
        {"head_dim": 32, "rope_scaling": RopeScaling(rope_type="llama3", **{**LLAMA3, "low_freq_factor": 0.5})},
    ),
    "dynamic": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": rope("dynamic", factor=2.0)},
        {"max_position_embeddings": 16, "rope_scaling": RopeScaling(rope_type="dynamic", factor=2.0)},
    ),
    "yarn": (
        "llama",
        {"rope_parameters": rope("yarn", **YARN)},
        {"rope_scaling": RopeScaling(rope_type="yarn", **YARN)},
    ),
    "yarn_ramp": (
        "llama",
        {"head_dim": 32, "rope_parameters": rope("yarn", **RAMP)},
        {"head_dim": 32, "rope_scaling": RopeScaling(rope_type="yarn", **RAMP)},
    ),
    "yarn_untruncated": (
        "llama",
        {"head_dim": 32, "rope_parameters": rope("yarn", **RAMP, truncate=False)},
        {"head_dim": 32, "rope_scaling": RopeScaling(rope_type="yarn", **RAMP, truncate=False)},
    ),
    "yarn_attention_factor": (
        "llama",
        {"rope_parameters": rope("yarn", **YARN, attention_factor=1.7)},
        {"rope_scaling": RopeScaling(rope_type="yarn", **YARN, attention_factor=1.7)},
    ),
    "yarn_mscales": (
        "llama",
        {"rope_parameters": rope("yarn", **YARN, mscale=1.5, mscale_all_dim=0.5)},
        {"rope_scaling": RopeScaling(rope_type="yarn", **YARN, mscale=1.5, mscale_all_dim=0.5)},
    ),
    "mistral_window": ("mistral", {"sliding_window": 8}, {"sliding_window": 8}),
    "mistral_window_of_one": ("mistral", {"sliding_window": 1}, {"sliding_window": 1}),
    "mistral_without_window": ("mistral", {"sliding_window": None}, {}),
    "qwen2": ("qwen2", {}, {"qkv_bias": True}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"qkv_bias": True, "sliding_window": 8},
    ),
    "qwen3": ("qwen3", {"head_dim": 12}, {"head_dim": 12, "qk_norm": True}),
    "qwen3_bias": ("qwen3", {"head_dim": 8, "attention_bias": True}, {"qk_norm": True, "attention_bias": True}),
}


def make_twins(case, *, dtype=torch.float32, **changes):
    family, theirs, ours = CASES[case]
    hf = hf_model(
        family, {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, **SIZES, **theirs, **changes}, dtype=dtype
    )
    return hf, twin_of(hf, LlamaConfig(**{**SIZES, **ours, **changes}))


def fresh_logits(hf, sample, labels=None):
    """What transformers gives one sample that is alone in the world: dynamic RoPE remembers the longest it saw."""
    rotary = hf.model.rotary_emb
    if hasattr(rotary, "original_inv_freq"):
        rotary.inv_freq = rotary.original_inv_freq.clone()
        rotary.max_seq_len_cached = rotary.original_max_seq_len
    labels = torch.tensor([labels]) if labels is not None else None
    with torch.no_grad():
        output = hf(torch.tensor([sample]), labels=labels)
    return output.logits[0], output.loss


def our_logits(model, samples):
    with torch.no_grad():
        (output,) = model(fuse(Run("", samples), with_labels=False))
    return output.logits.split([len(sample) for sample in samples])


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    hf, model = make_twins(case)
    samples = random_samples(LENGTHS)
    for sample, logits in zip(samples, our_logits(model, samples), strict=True):
        expected, _ = fresh_logits(hf, sample)
        assert expected.abs().max() > 0.5  # large enough that 1e-4 says something
        assert_close(logits, expected, 1e-4, f"{case}, {len(sample)} tokens")


# Options that change no weight's name or shape: the copy by name does not notice them.
OFF = {"rope_scaling": None, "sliding_window": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
SILENT = [name for name, (_, _, ours) in CASES.items() if ours.keys() & OFF.keys()]


@pytest.mark.parametrize("case", SILENT)
def test_the_option_acts(case):
    """Switched off, it changes the logits by far more than the tolerance: the comparison above can fail."""
    _, model = make_twins(case)
    samples = random_samples(LENGTHS)
    logits = our_logits(model, samples)
    _, _, ours = CASES[case]
    plain = LlamaForCausalLM(LlamaConfig(**{**SIZES, **ours, **{name: OFF[name] for name in OFF if name in ours}}))
    plain.load_state_dict(model.state_dict())
    assert (our_logits(plain, samples)[0] - logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["plain", "tied", "llama3", "dynamic", "mistral_window", "qwen2", "qwen3"])
def test_losses_equal_transformers(case):
    hf, model = make_twins(case)
    samples = random_samples((33, 12, 2))
    labels = [[-100] * 5 + samples[0][5:], samples[1], [-100, samples[2][1]]]
    outputs = model(fuse(*(Run("", [ids], [wanted]) for ids, wanted in zip(samples, labels, strict=True))))
    for output, ids, wanted in zip(outputs, samples, labels, strict=True):
        _, expected = fresh_logits(hf, ids, wanted)
        assert_close(output.loss, expected, 1e-5, case)
        assert output.num_supervised_tokens == sum(label != -100 for label in wanted[1:])
        assert output.logits is None

    (fused,) = model(fuse(Run("", samples, labels)))
    mean = sum(output.loss * output.num_supervised_tokens for output in outputs) / fused.num_supervised_tokens
    assert_close(fused.loss, mean, 1e-6, "mean over all supervised tokens of the run")


def test_neighbours_leave_a_sample_as_it_is_alone():
    """Order and company must not matter, least of all to dynamic RoPE."""
    _, model = make_twins("dynamic")
    samples = random_samples((70, 9, 1, 45, 9))
    alone = [our_logits(model, [sample])[0] for sample in samples]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 4, 0, 2, 3]):
        together = our_logits(model, [samples[i] for i in order])
        for i, logits in zip(order, together, strict=True):
            assert_close(logits, alone[i], 1e-5, f"sample {i} in order {order}")


# transformers computes its RoPE table, norms and softmax in float32 even in a float64 model, so nothing of it agrees to
# 1e-9 as it comes. `make_exact` lifts them; the table is written anew for that, and has to be plain RoPE.
EXACT = ["plain", "multi_query", "head_dim_wider", "tied", "attention_bias", "mlp_bias", "theta"]


@pytest.mark.parametrize("case", [*EXACT, "mistral_window", "qwen2", "qwen3", "qwen3_bias"])
def test_float64_equals_transformers(case, monkeypatch):
    hf, model = make_twins(case, dtype=torch.float64)
    make_exact(hf, model.config_, monkeypatch)
    samples = random_samples(LENGTHS)
    for sample, logits in zip(samples, our_logits(model, samples), strict=True):
        assert logits.dtype == torch.float64
        assert_close(logits, fresh_logits(hf, sample)[0], 1e-9, f"{case}, {len(sample)} tokens")


def make_exact(hf, config, monkeypatch):
    """Make a float64 model of transformers' float64 throughout."""
    hf.model.rotary_emb = ExactRotary(config.rope_theta, config.head_size)
    for module in hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            monkeypatch.setattr(module, "forward", exact_norm(module))
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))


def exact_norm(module):
    return lambda x: module.weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


@pytest.mark.parametrize("case", ["plain", "qwen2", "qwen3", "mistral_window", "yarn"])
def test_bfloat16_is_as_near_the_truth_as_transformers(case):
    """Kernel error at most the same-dtype reference's error and a little, both against the float32 logits."""
    hf, model = make_twins(case)
    samples = random_samples((40, 7, 1))
    truth = torch.cat([fresh_logits(hf, sample)[0] for sample in samples])
    hf, model = hf.bfloat16(), model.bfloat16()
    ours = torch.cat(our_logits(model, samples))
    theirs = torch.cat([fresh_logits(hf, sample)[0] for sample in samples])
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).norm() <= 1.3 * (theirs - truth).norm()


def test_every_base_weight_is_frozen():
    _, model = make_twins("qwen3_bias")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    (output,) = model(fuse(Run("", random_samples((5,)))))
    assert not output.loss.requires_grad
