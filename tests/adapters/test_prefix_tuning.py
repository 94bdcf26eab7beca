"""What a prefix is to attention, where it begins, and what its config refuses."""

import re

import pytest
import torch
from builders import add_random_adapter, assert_close, fuse, random_run, tiny_config, tiny_model
from torch import Tensor

from moe_peft import PrefixTuningConfig
from moe_peft.adapters import METHODS
from moe_peft.model.rope import rotary_table


def naive_attention(layer, x: Tensor, prefix: Tensor, config) -> Tensor:
    """One sample's mixed values ``[L, H * d]``, query by query: keys ``[2, V, G, d]`` stand before its own."""
    num_virtual, length = prefix.shape[1], x.shape[0]
    head, groups = config.head_size, config.num_kv_heads
    cos, sin = rotary_table(config, [num_virtual], [length], device=x.device, double=True)

    def rotated(features: Tensor) -> Tensor:
        left, right = features.chunk(2, dim=-1)
        return features * cos + torch.cat([-right, left], dim=-1) * sin

    def projected(linear) -> Tensor:
        return (x @ linear.base_layer_.weight.T).unflatten(1, (-1, head))

    q, k = rotated(projected(layer.q_proj)), rotated(projected(layer.k_proj))
    keys, values = torch.cat([prefix[0], k]), torch.cat([prefix[1], projected(layer.v_proj)])
    rows = []
    for i in range(length):
        place = num_virtual + i
        first = max(0, place + 1 - config.sliding_window) if config.sliding_window else 0
        heads = []
        for h in range(config.num_attention_heads):
            group = h // (config.num_attention_heads // groups)
            scores = keys[first : place + 1, group] @ q[i, h] / head**0.5
            heads.append(scores.softmax(0) @ values[first : place + 1, group])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 2, 5])
def test_attention_is_that_over_the_prefix_and_the_sample(window):
    model = tiny_model(tiny_config(num_hidden_layers=1, sliding_window=window), dtype=torch.float64)
    add_random_adapter(model, "qa", PrefixTuningConfig(num_virtual_tokens=3), std=1.0)
    layer, config = model.layers[0], model.config_
    run = random_run("qa", (6, 1, 4), seed=2)
    seen = {}
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, arguments: seen.update(mixed=arguments[0]))
    with torch.no_grad():
        (output,) = model(fuse(run), return_logits=True)
        # [V, N, 2, G, d] of one layer, as PEFT lays it out.
        prefix = model.adapter_state("qa")["prompt_embeddings"].view(3, 2, 2, config.head_size).transpose(0, 1)
        start = 0
        for sample in run.samples:
            x = layer.input_layernorm(model.embed_tokens(torch.tensor(sample)))
            expected = naive_attention(layer.self_attn, x, prefix, config)
            assert_close(seen["mixed"][start : start + len(sample)], expected, 1e-12, str(sample))
            start += len(sample)
    assert output.logits.shape[0] == start


@pytest.mark.parametrize("settings", [{}, {"prefix_projection": True}])
def test_a_prefix_of_zeros_takes_attention_and_gives_nothing(settings):
    """``init_weights: zero`` as peft has it: keys of zeros draw a score of zero each."""
    model = tiny_model(dtype=torch.float64)
    model.add_adapter("qa", PrefixTuningConfig(num_virtual_tokens=4, init_weights="zero", **settings))
    assert not model.prefixes_["qa"]().any()
    run = random_run("qa", (5,), seed=1)
    model(fuse(run))[0].loss.backward()
    assert any(gradient.abs().max() > 0 for gradient in model.adapter_gradients("qa").values())


def test_the_projection_is_computed_once_a_forward():
    model, calls = tiny_model(), []
    model.add_adapter("qa", PrefixTuningConfig(prefix_projection=True, num_virtual_tokens=2))
    model.prefixes_["qa"].transform.register_forward_hook(lambda *_: calls.append(1))
    for mode in ("none", "full", "selective"):
        model.activation_checkpointing_ = mode
        calls.clear()
        model.train()(fuse(random_run("qa", (5, 2, 2), seed=1)))[0].loss.backward()
        assert calls == [1], mode


def test_it_inserts_nothing_and_takes_its_places():
    config = PrefixTuningConfig(num_virtual_tokens=7)
    assert (config.inserted_tokens, config.context_tokens) == (0, 7)
    for name in ("prompt_tuning", "p_tuning"):
        prompt = METHODS[name](num_virtual_tokens=7)
        assert (prompt.inserted_tokens, prompt.context_tokens) == (7, 7)
    assert {METHODS[name]().context_tokens for name in ("lora", "mixlora")} == {0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": -1}, "num_virtual_tokens=-1 must be at least 1"),
        ({"prefix_projection": True, "encoder_hidden_size": 0}, "encoder_hidden_size=0 must be at least 1, or null"),
        ({"encoder_hidden_size": 5}, "encoder_hidden_size=5 is for prefix_projection=true"),
        ({"init_weights": "one"}, "init_weights='one' must be zero"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.compile(message)):
        PrefixTuningConfig(**settings)
