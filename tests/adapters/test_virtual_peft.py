"""Prompt tuning, P-tuning, prefix tuning: logits, gradients, files and first weights equal those of the real peft."""

import peft
import pytest
import torch
from builders import Run, add_random_adapter, assert_close, fuse, tiny_config, tiny_model
from virtual_peft import (
    BASES,
    RUN,
    make_bases,
    make_pair,
    our_logits,
    our_step,
    reload_into_peft,
    their_logits,
    their_saved,
    their_step,
)

from moe_peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, load_adapter, save_adapter

LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5}
CASES = {
    "prompt": (PromptTuningConfig, peft.PromptTuningConfig, {"num_virtual_tokens": 3}),
    "one prompt token": (PromptTuningConfig, peft.PromptTuningConfig, {"num_virtual_tokens": 1}),
    "mlp": (PromptEncoderConfig, peft.PromptEncoderConfig, {"num_virtual_tokens": 3, "encoder_hidden_size": 11}),
    "mlp as wide as the model": (PromptEncoderConfig, peft.PromptEncoderConfig, {"num_virtual_tokens": 5}),
    "lstm": (PromptEncoderConfig, peft.PromptEncoderConfig, {"num_virtual_tokens": 3, **LSTM}),
    "deep lstm": (
        PromptEncoderConfig,
        peft.PromptEncoderConfig,
        {"num_virtual_tokens": 3, "encoder_num_layers": 3, **LSTM},
    ),
    "prefix": (PrefixTuningConfig, peft.PrefixTuningConfig, {"num_virtual_tokens": 3}),
    "projected prefix": (
        PrefixTuningConfig,
        peft.PrefixTuningConfig,
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 7},
    ),
}
ONE_OF_EACH = ["prompt", "mlp", "deep lstm", "prefix", "projected prefix"]


def configs(case):
    """Ours and peft's."""
    ours, theirs, settings = CASES[case]
    return ours(**settings), theirs(task_type="CAUSAL_LM", **settings)


def check(case, base, dtype, tolerance):
    theirs, model, live = make_pair(*configs(case), base, dtype)
    logits, loss = their_step(theirs, RUN)
    loss.backward()
    plain = our_logits(model, RUN, name="")
    for training in (False, True):
        output, gradients = our_step(model.train(training), RUN)
        assert_close(output.logits, logits, tolerance, "logits")
        assert_close(output.loss, loss, tolerance, "loss")
        for name, gradient in gradients.items():
            assert live[name].grad.abs().max() > 0, name
            assert_close(gradient, live[name].grad, tolerance, name)
            # As a whole, too: the gradients of an encoder's first layers are small.
            assert (gradient - live[name].grad).norm() <= 1e-3 * live[name].grad.norm(), name
    assert (plain - logits).abs().max() > 1e-2  # the adapter acts


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_pefts(case):
    check(case, "grouped", torch.float32, 1e-5)


@pytest.mark.parametrize("base", [base for base in BASES if base != "grouped"])
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_on_other_bases(case, base):
    """Biases, equal heads, a window that the virtual tokens leave, stretched positions, normed keys."""
    check(case, base, torch.float32, 1e-5)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_in_float64(case):
    """transformers' norms and softmax stay float32 in a float64 model, hence no closer."""
    check(case, "grouped", torch.float64, 5e-6)


def test_the_first_token_is_predicted_from_the_last_virtual_one():
    """As peft puts -100 before the labels; behind a prefix nothing predicts it, as peft's outputs begin with it."""
    run = Run("qa", [[5, 6], [7]])
    for case, count in (("prompt", 3), ("mlp", 3), ("prefix", 1)):
        theirs, model, _ = make_pair(*configs(case))
        output, _ = our_step(model, run)
        _, loss = their_step(theirs, run)
        assert output.num_supervised_tokens == count
        assert_close(output.loss, loss, 1e-5, case)
        assert output.logits.shape == (3, 61)


@pytest.mark.parametrize("base", ["grouped", "biases"])
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_we_save(case, base, tmp_path):
    model = make_bases(base)[1]
    add_random_adapter(model, "qa", configs(case)[0], seed=4)
    theirs = reload_into_peft(model, base, tmp_path / "qa")
    assert_close(our_logits(model, RUN), their_logits(theirs, RUN), 1e-4, "logits")
    assert (our_logits(model, RUN) - our_logits(model, RUN, name="")).abs().max() > 1e-2


@pytest.mark.parametrize("base", ["grouped", "biases"])
@pytest.mark.parametrize("case", CASES)
def test_we_read_what_peft_saves(case, base, tmp_path):
    theirs, model, _ = make_pair(*configs(case), base)
    expected = their_logits(theirs, RUN)
    load_adapter(model, their_saved(theirs, tmp_path / "theirs"), "read")
    assert_close(our_logits(model, RUN, name="read"), expected, 1e-4, "logits")
    assert list(model.adapter_state("read")) == ["prompt_embeddings"]
    # It trains on from there, as parameters of its own.
    _, gradients = our_step(model.train(), Run("read", RUN.samples, RUN.labels))
    assert gradients["prompt_embeddings"].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_it_answers_with_the_same_bits(case, dtype, tmp_path):
    model = tiny_model(dtype=dtype)
    add_random_adapter(model, "qa", configs(case)[0], seed=4)
    save_adapter(model, "qa", tmp_path / "qa")
    load_adapter(model, tmp_path / "qa", "again")
    save_adapter(model, "again", tmp_path / "once more")
    load_adapter(model, tmp_path / "once more", "third")
    expected = our_logits(model, RUN)
    assert torch.equal(our_logits(model, RUN, name="again"), expected)
    assert torch.equal(our_logits(model, RUN, name="third"), expected)


@pytest.mark.parametrize("case", CASES)
def test_initial_weights_are_distributed_as_pefts(case):
    """Equal deviation, and equal support where it is bounded, over weights enough that a wrong bound shows."""
    ours, theirs, settings = CASES[case]
    settings = {**settings, "num_virtual_tokens": 40}
    if "encoder_hidden_size" in settings:
        settings["encoder_hidden_size"] = 90
    model = tiny_model(tiny_config(hidden_size=160))
    model.add_adapter("qa", ours(**settings))
    hf, _ = make_bases("grouped")
    hf.config.hidden_size = 160  # all that peft's encoders look at
    sizes = {"token_dim": 160, "num_attention_heads": 4, "num_layers": 2}
    if ours is PrefixTuningConfig:
        sizes |= {"token_dim": 80, "num_attention_heads": 2}
        encoder = peft.PrefixEncoder(peft_config(theirs, settings, sizes))
    elif ours is PromptEncoderConfig:
        encoder = peft.PromptEncoder(peft_config(theirs, settings, sizes))
    else:
        encoder = peft.PromptEmbedding(peft_config(theirs, settings, sizes), hf.model.embed_tokens)
    expected = dict(encoder.named_parameters())
    if len(expected) == 1:
        expected = {"prompt_embeddings": expected["embedding.weight"]}
    found = model.adapter_state("qa")
    assert found.keys() == expected.keys()
    for name, values in found.items():
        wanted = expected[name]
        assert values.shape == wanted.shape, name
        assert values.std().item() == pytest.approx(wanted.std().item(), rel=0.2), name
        assert abs(values.mean()) < 0.25 * values.std(), name
        if wanted.abs().max() < 1:  # uniform
            assert values.abs().max().item() == pytest.approx(wanted.abs().max().item(), rel=0.1), name


def peft_config(cls, settings, sizes):
    config = cls(task_type="CAUSAL_LM", num_transformer_submodules=1, **{**settings, **sizes})
    if getattr(config, "encoder_hidden_size", 1) is None:
        config.encoder_hidden_size = config.token_dim
    return config


@pytest.mark.parametrize("case", CASES)
def test_initial_weights_follow_from_seed_and_name_alone(case):
    config = configs(case)[0]

    def drawn(name, seed):
        model = tiny_model()
        torch.manual_seed(len(name))
        state = torch.get_rng_state()
        model.add_adapter(name, config, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return model.adapter_state(name)

    first = drawn("qa", 3)
    assert all(torch.equal(values, drawn("qa", 3)[key]) for key, values in first.items())
    for other in (drawn("qa", 4), drawn("other", 3)):
        assert not any(torch.equal(values, other[key]) for key, values in first.items())


@pytest.mark.parametrize("case", CASES)
def test_no_two_gradients_share_memory(case):
    """Gradients are clipped in place."""
    model = tiny_model()
    model.add_adapter("qa", configs(case)[0])
    (output,) = model(fuse(RUN))
    weights = model.adapter_parameters("qa")
    found = torch.autograd.grad(output.loss, weights)
    places = [gradient.untyped_storage().data_ptr() + gradient.storage_offset() for gradient in found]
    assert len(set(places)) == len(weights)


def test_foreign_files_are_refused(tmp_path):
    theirs, model, _ = make_pair(*configs("prefix"))
    folder = their_saved(theirs, tmp_path / "theirs")
    other = tiny_model(tiny_config(num_key_value_heads=4))
    with pytest.raises(ValueError, match=r"prompt_embeddings has shape \[3, 48\].*another base"):
        load_adapter(other, folder, "qa")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"num_transformer_submodules": 1', '"num_transformer_submodules": 2'))
    with pytest.raises(ValueError, match="num_transformer_submodules=2 must be 1"):
        load_adapter(model, folder, "again")
    assert other.adapter_names == []


def test_weights_of_pefts_float16_folder_load(tmp_path):
    theirs, model, _ = make_pair(*configs("prompt"))
    folder = their_saved(theirs.half(), tmp_path / "theirs")
    load_adapter(model, folder, "half")
    (values,) = model.adapter_state("half").values()
    assert values.dtype == torch.float32
    assert_close(values, theirs.prompt_encoder["default"].embedding.weight.float(), 0.0, "embeddings")
