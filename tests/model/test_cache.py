"""Decoding through the cache gives the logits of the full forward."""

import pytest
import torch
from builders import Run, add_random_adapter, assert_close, fuse, random_samples, tiny_config, tiny_model
from hf_twin import hf_model, twin_of

from moe_peft import LoraConfig, MixLoraConfig, RopeScaling
from moe_peft.model.cache import KVCache

CONFIGS = {
    "grouped": {},
    "window": {"sliding_window": 3},
    "qk_norm": {"qk_norm": True},
    "yarn": {"rope_scaling": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)},
    "llama3": {"rope_scaling": RopeScaling(rope_type="llama3", factor=4.0, original_max_position_embeddings=8)},
}


def new_cache(model, num_samples, capacity=16):
    return KVCache(model.config_, num_samples, capacity, dtype=model.dtype, device=model.device)


def full_logits(model, samples, names):
    """One list of rows a sample, each sample forwarded alone and whole."""
    found = []
    for sample, name in zip(samples, names, strict=True):
        (output,) = model(fuse(Run(name, [sample]), with_labels=False))
        found.append(output.logits)
    return found


def step(model, cache, pieces, names, **options):
    """Logits of the next tokens of every sample."""
    runs = [Run(name, [piece]) for piece, name in zip(pieces, names, strict=True)]
    return [output.logits for output in model(fuse(*runs, with_labels=False), cache=cache, **options)]


@pytest.fixture(params=CONFIGS)
def model(request):
    model = tiny_model(tiny_config(**CONFIGS[request.param]))
    add_random_adapter(model, "lora", LoraConfig(r=3), seed=1)
    add_random_adapter(model, "mix", MixLoraConfig(r=2, num_experts=4), seed=2)
    return model


NAMES = ["", "mix", "lora", "mix"]
LENGTHS = (9, 4, 12, 7)


@torch.no_grad()
@pytest.mark.parametrize("prompts", [(5, 1, 3, 2), (2, 2, 2, 2), (1, 1, 1, 1), (8, 1, 11, 1)])
def test_token_by_token(model, prompts):
    samples = random_samples(LENGTHS)
    expected = full_logits(model, samples, NAMES)
    cache = new_cache(model, 4, capacity=12)
    names, place, done = list(NAMES), list(prompts), [0, 1, 2, 3]
    logits = step(model, cache, [sample[:prompt] for sample, prompt in zip(samples, prompts, strict=True)], names)
    for i, rows in enumerate(logits):
        assert_close(rows, expected[i][: prompts[i]], 1e-5, f"prompt of sample {i}")
    assert cache.lengths_ == list(prompts)
    while True:
        left = [slot for slot, sample in enumerate(done) if place[sample] < LENGTHS[sample]]
        if not left:
            break
        cache.keep(left)  # the others are done: their rows leave the cache
        done = [done[slot] for slot in left]
        logits = step(model, cache, [[samples[i][place[i]]] for i in done], [NAMES[i] for i in done])
        for i, rows in zip(done, logits, strict=True):
            assert_close(rows, expected[i][place[i] : place[i] + 1], 1e-5, f"token {place[i]} of sample {i}")
            place[i] += 1


@torch.no_grad()
def test_pieces_of_different_lengths(model):
    """A turn of a chat comes behind what the cache holds already: several new tokens here, one there."""
    samples = random_samples(LENGTHS)
    expected = full_logits(model, samples, NAMES)
    cache = new_cache(model, 4)
    for cuts in ([(0, 2), (0, 1), (0, 6), (0, 3)], [(2, 6), (1, 2), (6, 7), (3, 6)], [(6, 9), (2, 4), (7, 12), (6, 7)]):
        pieces = [sample[start:end] for sample, (start, end) in zip(samples, cuts, strict=True)]
        for i, rows in enumerate(step(model, cache, pieces, NAMES)):
            assert_close(rows, expected[i][slice(*cuts[i])], 1e-5, f"sample {i}, tokens {cuts[i]}")


@torch.no_grad()
def test_last_logits_only(model):
    samples = random_samples(LENGTHS)
    expected = [rows[-1:] for rows in full_logits(model, samples, NAMES)]
    for i, rows in enumerate(step(model, new_cache(model, 4), samples, NAMES, last_logits_only=True)):
        assert_close(rows, expected[i], 1e-5, f"sample {i}")
    (output,) = model(fuse(Run("", samples), with_labels=False), last_logits_only=True)
    assert output.logits.shape == (4, model.config_.vocab_size)
    assert_close(output.logits[:1], expected[0], 1e-5)


@torch.no_grad()
def test_keep_reorders_and_repeats():
    model = tiny_model()
    samples = random_samples((6, 3, 5))
    expected = full_logits(model, samples, [""] * 3)
    cache = new_cache(model, 3)
    step(model, cache, [sample[:-1] for sample in samples], [""] * 3)
    cache.keep([0, 1, 2])
    assert cache.lengths_ == [5, 2, 4]
    cache.keep([2, 0, 2])
    assert cache.lengths_ == [4, 5, 4]
    for i, rows in zip([2, 0, 2], step(model, cache, [samples[i][-1:] for i in [2, 0, 2]], [""] * 3), strict=True):
        assert_close(rows, expected[i][-1:], 1e-5, f"sample {i}")


@torch.no_grad()
def test_full_cache_is_refused():
    model = tiny_model()
    cache = new_cache(model, 2, capacity=4)
    step(model, cache, [[1, 2, 3, 4], [5]], ["", ""])
    with pytest.raises(ValueError, match="sample 0 reaches 5 tokens, but the cache holds 4"):
        step(model, cache, [[1], [2]], ["", ""])


@torch.no_grad()
@pytest.mark.parametrize("wrong", [1, 3])
def test_cache_of_another_batch_is_refused(wrong):
    model = tiny_model()
    with pytest.raises(ValueError, match=f"2 samples.*{wrong}|{wrong}.*2 samples"):
        step(model, new_cache(model, wrong), [[1], [2]], ["", ""])


@torch.no_grad()
def test_nan_in_one_sample_stays_there():
    """Masked slots are multiplied by zero, and 0 * NaN is NaN: no row may look into another's."""
    model = tiny_model()
    add_random_adapter(model, "bad", LoraConfig(r=2))
    model.adapter_state("bad")["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"][0, 0] = torch.nan
    samples = random_samples((4, 7))
    expected = full_logits(model, samples[:1], [""])[0]
    cache = new_cache(model, 2)
    step(model, cache, [sample[:3] for sample in samples], ["", "bad"])
    good, bad = step(model, cache, [samples[0][3:], samples[1][3:4]], ["", "bad"])
    assert bad.isnan().all()
    assert_close(good, expected[3:], 1e-5)


@torch.no_grad()
def test_dynamic_rope_decodes_as_transformers_does():
    """Keys keep the angles of the length at which they came, so only transformers' own cache says what is right."""
    settings = {"factor": 3.0, "rope_type": "dynamic", "rope_theta": 10000.0}
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 38, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 6}
    samples = random_samples((12, 9))
    hf = hf_model("llama", {**sizes, **heads, "rope_parameters": settings})
    scaling = RopeScaling(rope_type="dynamic", factor=3.0)
    model = twin_of(hf, tiny_config(max_position_embeddings=6, rope_scaling=scaling))
    expected = []
    for sample in samples:
        fresh = hf_model("llama", {**sizes, **heads, "rope_parameters": settings})
        past, rows = None, []
        for place, tokens in [(0, sample[:4]), *((i, sample[i : i + 1]) for i in range(4, len(sample)))]:
            output = fresh(torch.tensor([tokens]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            rows.append(output.logits[0])
            assert past.get_seq_length() == place + len(tokens)
        expected.append(torch.cat(rows))
    cache = new_cache(model, 2)
    for start, end in [(0, 4), *((i, i + 1) for i in range(4, 9))]:
        for i, rows in enumerate(step(model, cache, [sample[start:end] for sample in samples], ["", ""])):
            assert_close(rows, expected[i][start:end], 1e-4, f"sample {i}, token {start}")
