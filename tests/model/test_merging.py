"""Merging an adapter into the base weights and taking it out again, for every registered method."""

import copy

import peft
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
    randomize,
    tiny_config,
    tiny_model,
)
from hf_twin import hf_model, our_name, twin_of
from safetensors.torch import load_file

from moe_peft import LlamaConfig, LoraConfig, MixLoraConfig, load_adapter, save_adapter
from moe_peft.adapters import METHODS
from moe_peft.adapters.lora import PROJECTIONS
from moe_peft.generation import generate_tokens
from moe_peft.generation.request import Request, check_request
from moe_peft.model.linear import Linear, LinearAdapter
from moe_peft.model.merging import check_mergeable, merge

SAMPLES = random_samples((9, 4, 1, 6))
BIASED = {"attention_bias": True, "mlp_bias": True}


def carrier(method, *, dtype=torch.float32, **changes):
    """A model with a random ``qa`` of that method, and a plain LoRA beside it."""
    model = tiny_model(tiny_config(**changes), dtype=dtype)
    add_random_adapter(model, "qa", METHODS[method](), seed=3)
    add_random_adapter(model, "other", LoraConfig(r=3), seed=5)
    return model


def is_mergeable(model, name="qa"):
    try:
        check_mergeable(model, name)
    except ValueError:
        return False
    return True


MERGEABLE = [method for method in METHODS if is_mergeable(carrier(method))]
REFUSED = [method for method in METHODS if method not in MERGEABLE]


def logits_of(model, name, samples=SAMPLES):
    with torch.no_grad():
        return model(fuse(Run(name, samples), with_labels=False))[0].logits


def base_bits(model):
    return {name: weight.clone() for name, weight in model.named_parameters() if "base_layer_" in name}


def assert_same_bits(model, expected):
    weights = dict(model.named_parameters())
    for name, weight in expected.items():
        assert weights[name].dtype == weight.dtype
        assert torch.equal(weights[name], weight), name


def test_the_list_of_mergeable_methods_is_not_empty():
    assert "lora" in MERGEABLE
    assert "mixlora" in REFUSED


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merged_weights_answer_as_the_adapter_does(method, dtype):
    model = carrier(method, dtype=dtype, **BIASED)
    before, plain = logits_of(model, "qa"), logits_of(model, "")
    assert (before - plain).abs().max() > 1e-3
    bits = base_bits(model)
    model.merge_adapter("qa")
    assert model.merged_adapter == "qa"
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(logits_of(model, "qa"), before, tolerance, "as qa")
    assert torch.equal(logits_of(model, ""), logits_of(model, "qa"))
    model.unmerge_adapter("qa")
    assert model.merged_adapter is None
    assert_same_bits(model, bits)
    assert torch.equal(logits_of(model, "qa"), before)
    assert torch.equal(logits_of(model, ""), plain)


@pytest.mark.parametrize("method", MERGEABLE)
def test_bfloat16_weights_are_rounded_once(method):
    """From the sum in float32: each is the nearest bfloat16 to the weight of the same model in float32, merged."""
    model, wide = carrier(method, dtype=torch.bfloat16, **BIASED), carrier(method, **BIASED)
    with torch.no_grad():
        for (name, weight), (other_name, narrow) in zip(wide.named_parameters(), model.named_parameters(), strict=True):
            assert name == other_name
            weight.copy_(narrow)
        # What a method made of the base when it was attached has to be made of the same base.
        wide.remove_adapter("qa")
        wide.add_adapter("qa", METHODS[method](), seed=3)
        state = {**wide.adapter_state("qa"), **wide.adapter_buffers("qa")}
        for key, tensor in {**model.adapter_state("qa"), **model.adapter_buffers("qa")}.items():
            state[key].copy_(tensor)
    bits = base_bits(model)
    model.merge_adapter("qa")
    wide.merge_adapter("qa")
    merged, exact = base_bits(model), base_bits(wide)
    assert any(not torch.equal(merged[name], bits[name]) for name in bits)
    for name in merged:
        assert torch.equal(merged[name], exact[name].bfloat16()), name
    model.unmerge_adapter("qa")
    assert_same_bits(model, bits)


def test_lora_is_the_rounded_sum_to_the_bit():
    model = carrier("lora", dtype=torch.bfloat16)
    linear = model.layers[1].mlp.down_proj
    lora, weight = linear.loras_["qa"], linear.base_layer_.weight.clone()
    model.merge_adapter("qa")
    expected = (weight.float() + 2.0 * (lora.lora_B.detach() @ lora.lora_A.detach())).bfloat16()
    assert torch.equal(linear.base_layer_.weight, expected)


@pytest.mark.parametrize("settings", [{}, {"r": 4, "lora_alpha": 3, "use_rslora": True}], ids=str)
def test_lora_weights_equal_pefts_merge(settings):
    sizes = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 38, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    hf = hf_model("llama", sizes)
    model = twin_of(hf, LlamaConfig(**sizes))
    add_random_adapter(model, "qa", LoraConfig(**settings), seed=4)
    theirs = peft.get_peft_model(
        hf, peft.LoraConfig(**{"lora_alpha": 16, "target_modules": list(PROJECTIONS), **settings})
    )
    state = model.adapter_state("qa")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name.replace(".default.", ".")])
    model.merge_adapter("qa")
    expected = {our_name(name): weight for name, weight in theirs.merge_and_unload().named_parameters()}
    for name, weight in model.named_parameters():
        if "lora" not in name:
            assert_close(weight, expected[name], 1e-6, name)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_started_from_the_base_weights_is_merged_once(init, tmp_path):
    model = tiny_model()
    add_random_adapter(model, "qa", LoraConfig(r=3, init_lora_weights=init), seed=3)
    before, bits = logits_of(model, "qa"), base_bits(model)
    save_adapter(model, "qa", tmp_path / "qa")
    model.merge_adapter("qa")
    assert_close(logits_of(model, "qa"), before, 1e-5)
    save_adapter(model, "qa", tmp_path / "merged")  # what it subtracts is of the plain base still
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("qa", "merged"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    model.unmerge_adapter("qa")
    assert_same_bits(model, bits)


@pytest.mark.parametrize("method", REFUSED)
def test_what_no_weight_equals_is_refused_by_name(method):
    model = carrier(method, **BIASED)
    bits = base_bits(model)
    with pytest.raises(ValueError, match=r"adapter 'qa' cannot be merged: .*(router|keeps in|is no change)"):
        model.merge_adapter("qa")
    assert model.merged_adapter is None
    assert_same_bits(model, bits)


def test_a_mixture_and_its_experts_are_refused():
    model = tiny_model()
    add_random_adapter(model, "mix", MixLoraConfig(num_experts=3))
    with pytest.raises(ValueError, match="adapter 'mix' cannot be merged: the router of MixLoraConfig chooses experts"):
        model.merge_adapter("mix")
    with pytest.raises(ValueError, match=r"'moe\.mix\.experts\.0' cannot be merged: it is one expert"):
        model.merge_adapter("moe.mix.experts.0")


class Shifting(LinearAdapter):
    """Adds a bias, and knows its merged form or does not."""

    changes_output_ = True

    def behind(self, y, base_layer):
        return y + 1


class ShiftingMerged(Shifting):
    def merged(self, weight, bias):
        return weight, weight.new_ones(weight.shape[0]) if bias is None else bias + 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Shifting, "what LoraConfig does at layers.1.mlp.down_proj is no change of its weight"),
        (ShiftingMerged, "it adds a bias to layers.1.mlp.down_proj, which has none"),
    ],
)
def test_what_a_projection_cannot_take_up_is_refused(kind, message):
    model = carrier("lora")
    bits, before = base_bits(model), logits_of(model, "qa")
    model.layers[1].mlp.down_proj.loras_["qa"] = kind()
    with pytest.raises(ValueError, match=f"adapter 'qa' cannot be merged: {message}"):
        model.merge_adapter("qa")
    assert_same_bits(model, bits)
    assert not torch.equal(logits_of(model, "qa"), before)  # it runs on, unmerged


def test_a_bias_is_merged_where_there_is_one():
    model = carrier("lora", **BIASED)
    model.layers[1].mlp.down_proj.loras_["qa"] = ShiftingMerged()
    before, bits = logits_of(model, "qa"), base_bits(model)
    model.merge_adapter("qa")
    assert_close(logits_of(model, "qa"), before, 1e-5)
    model.unmerge_adapter("qa")
    assert_same_bits(model, bits)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e30, torch.float16)], ids=str)
def test_values_that_are_not_finite_are_refused_and_nothing_has_changed(value, dtype):
    model = carrier("lora", dtype=dtype)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.loras_["qa"].lora_B[0, 0] = value
    bits = base_bits(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj would hold values that are not finite"):
        model.merge_adapter("qa")
    assert model.merged_adapter is None
    assert_same_bits(model, bits)


def test_an_error_half_way_restores_everything(monkeypatch):
    model = carrier("lora")
    bits, seen = base_bits(model), []

    def failing(linear, *arguments):
        seen.append(linear)
        if len(seen) == 8:
            raise torch.OutOfMemoryError("no memory")
        return real(linear, *arguments)

    real = merge.__globals__["merged_base"]
    monkeypatch.setattr("moe_peft.model.merging.merged_base", failing)
    with pytest.raises(torch.OutOfMemoryError):
        model.merge_adapter("qa")
    assert model.merged_adapter is None
    assert_same_bits(model, bits)


def test_what_cannot_be_done_while_merged():
    model = carrier("lora")
    with pytest.raises(ValueError, match="adapter 'qa' is not merged into the base model: none is"):
        model.unmerge_adapter("qa")
    with pytest.raises(ValueError, match=r"adapter 'qaa' is not attached to this model; did you mean 'qa'\?"):
        model.merge_adapter("qaa")
    model.merge_adapter("qa")
    first = r"unmerge_adapter\('qa'\) first"
    with pytest.raises(ValueError, match="adapter 'other' runs beside the plain base model, but 'qa' is.*" + first):
        model(fuse(Run("qa", SAMPLES), Run("other", SAMPLES)))
    with pytest.raises(ValueError, match="adapter 'other' runs beside the plain base model"):
        check_request(model, Request(prompt_ids=(1,), adapter_name="other"))
    with pytest.raises(ValueError, match="adapter 'other' cannot be merged while 'qa' is: " + first):
        model.merge_adapter("other")
    with pytest.raises(ValueError, match="adapter 'qa' cannot be merged while 'qa' is"):
        model.merge_adapter("qa")
    with pytest.raises(ValueError, match="adapter 'other' is not merged into the base model: 'qa' is"):
        model.unmerge_adapter("other")
    with pytest.raises(ValueError, match="adapter 'new' belongs beside the plain base model, but 'qa' is.*" + first):
        model.add_adapter("new", LoraConfig())
    model.train()
    with pytest.raises(ValueError, match="adapter 'qa' is merged into the base model and cannot be trained: " + first):
        model(fuse(Run("qa", SAMPLES)))
    assert model.adapter_names == ["qa", "other"]
    model.unmerge_adapter("qa")
    backward(model(fuse(random_run("qa", (5,)), random_run("other", (6,)))))
    assert all(gradient is not None for gradient in model.adapter_gradients("qa").values())


def test_removing_a_merged_adapter_leaves_the_plain_base():
    model = carrier("lora")
    bits = base_bits(model)
    other = logits_of(model, "other")
    model.merge_adapter("qa")
    model.remove_adapter("qa")
    assert model.merged_adapter is None
    assert_same_bits(model, bits)
    assert torch.equal(logits_of(model, "other"), other)
    model.merge_adapter("other")


@pytest.mark.parametrize("method", MERGEABLE)
def test_a_merged_adapter_is_saved_as_it_is(method, tmp_path):
    model = carrier(method)
    before = logits_of(model, "qa")
    save_adapter(model, "qa", tmp_path / "before")
    model.merge_adapter("qa")
    save_adapter(model, "qa", tmp_path / "merged")
    expected, saved = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    with pytest.raises(ValueError, match="adapter 'again' belongs beside the plain base model"):
        load_adapter(model, tmp_path / "merged", "again")
    model.unmerge_adapter("qa")
    load_adapter(model, tmp_path / "merged", "again")
    assert_close(logits_of(model, "again"), before, 1e-6)


@pytest.mark.parametrize("method", MERGEABLE)
def test_generation_with_a_cache_goes_on_as_before(method):
    model = carrier(method)

    def answer(name):
        requests = [Request(prompt_ids=tuple(sample), adapter_name=name, max_new_tokens=6) for sample in SAMPLES]
        return [done.token_ids for done in generate_tokens(model.train(), _Ids(), requests)]

    before = answer("qa")
    assert before != answer("")
    model.merge_adapter("qa")
    assert answer("qa") == before == answer("")


class _Ids:
    """A tokenizer whose text nobody reads."""

    eos_token_ids = ()
    special_ids = {}  # noqa: RUF012

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def test_tied_heads_and_copies_are_independent():
    model = carrier("lora", tie_word_embeddings=True)
    table, bits = model.embed_tokens.weight.clone(), base_bits(model)
    model.merge_adapter("qa")
    assert model.lm_head_.weight is model.embed_tokens.weight
    assert torch.equal(model.embed_tokens.weight, table)
    twin = copy.deepcopy(model)
    twin.unmerge_adapter("qa")
    assert_same_bits(twin, bits)
    assert model.merged_adapter == "qa"
    assert not torch.equal(
        model.layers[0].mlp.up_proj.base_layer_.weight, bits["layers.0.mlp.up_proj.base_layer_.weight"]
    )


def test_the_original_weights_follow_the_model():
    model = carrier("lora")
    bits = base_bits(model)
    model.merge_adapter("qa")
    model.double()
    model.unmerge_adapter("qa")
    assert_same_bits(model, {name: weight.double() for name, weight in bits.items()})


def test_only_what_the_adapter_sits_on_changes_and_no_base_weight_learns():
    model = tiny_model()
    add_random_adapter(model, "qa", LoraConfig(r=2, target_modules=["v_proj"]))
    bits = base_bits(model)
    model.merge_adapter("qa")
    changed = {name for name, weight in base_bits(model).items() if not torch.equal(weight, bits[name])}
    assert changed == {f"layers.{i}.self_attn.v_proj.base_layer_.weight" for i in range(2)}
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert not any(linear.base_layer_.weight.requires_grad for linear in linears)
    randomize(model.adapter_state("qa"), 9)  # editing the adapter does not reach the merged weights
    after = base_bits(model)
    assert changed == {name for name in bits if not torch.equal(after[name], bits[name])}
