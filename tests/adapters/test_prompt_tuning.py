"""Where the virtual tokens of prompt tuning begin, and what its config refuses."""

import json
import re

import peft
import pytest
import torch
from builders import tiny_model
from tiny_run import byte_tokenizer
from tokenizers import processors
from virtual_peft import make_bases

from moe_peft import LlamaConfig, LlamaForCausalLM, PromptTuningConfig, load_adapter, load_tokenizer, save_adapter

TEXTS = ["Sort these words: one, two, three, and many more of them", "Yes", "é 漢"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer that puts a token before each text, and no model."""
    tokenizer, path = byte_tokenizer(), tmp_path_factory.mktemp("tokenizer")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def model():
    return tiny_model(LlamaConfig(**{**SIZES, "vocab_size": 500}))


SIZES = {
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("count", [1, 4, 50])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_begins_as_in_peft(text, count, model, folder):
    """Cut to the virtual tokens, or said again until there are enough."""
    config = PromptTuningConfig(num_virtual_tokens=count, prompt_tuning_init="TEXT", prompt_tuning_init_text=text)
    model.add_adapter("qa", config, tokenizer=load_tokenizer(folder))
    table = torch.nn.Embedding.from_pretrained(model.embed_tokens.weight.detach())
    their_config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=count,
        num_transformer_submodules=1,
        token_dim=24,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(folder),
    )
    expected = peft.PromptEmbedding(their_config, table).embedding.weight
    found = model.adapter_state("qa")["prompt_embeddings"]
    model.remove_adapter("qa")
    assert found.shape == (count, 24)
    assert torch.equal(found, expected)
    assert found.data_ptr() != table.weight.data_ptr()


def test_sampled_tokens_are_rows_of_the_table(model):
    model.add_adapter("qa", PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", num_virtual_tokens=40), seed=2)
    found = model.adapter_state("qa")["prompt_embeddings"]
    model.remove_adapter("qa")
    rows = [(model.embed_tokens.weight == values).all(dim=1).nonzero().flatten().tolist() for values in found]
    assert all(len(places) == 1 for places in rows)
    assert len({place for (place,) in rows}) > 30  # of 500, so few are drawn twice


def test_a_text_needs_a_tokenizer_that_fits(model, folder):
    config = PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="Yes")
    with pytest.raises(ValueError, match=r"prompt_tuning_init='TEXT' needs the base model's tokenizer"):
        model.add_adapter("qa", config)
    small = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 20}))
    with pytest.raises(ValueError, match=r"prompt_tuning_init_text='Yes' gives token \d+, .*vocab_size=20"):
        small.add_adapter("qa", config, tokenizer=load_tokenizer(folder))

    class Silent:
        def encode(self, text):
            return []

    with pytest.raises(ValueError, match="prompt_tuning_init_text='Yes' must come to at least one token"):
        model.add_adapter("qa", config, tokenizer=Silent())
    assert model.adapter_names == small.adapter_names == []


def test_a_saved_text_is_told_and_needs_no_tokenizer(folder, tmp_path):
    """Neither here nor in peft, which asks for a tokenizer's name all the same."""
    hf, model = make_bases("grouped")
    config = PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="Yes")

    class Letters:
        def encode(self, text):
            return [ord(letter) % 61 for letter in text]

    model.add_adapter("qa", config, tokenizer=Letters())
    save_adapter(model, "qa", tmp_path / "qa")
    told = json.loads((tmp_path / "qa" / "adapter_config.json").read_text())
    assert (told["prompt_tuning_init"], told["prompt_tuning_init_text"]) == ("TEXT", "Yes")
    load_adapter(model, tmp_path / "qa", "again")
    theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path / "qa"))
    (saved,) = model.adapter_state("again").values()
    assert torch.equal(saved, model.adapter_state("qa")["prompt_embeddings"])
    assert torch.equal(saved, theirs.prompt_encoder["default"].embedding.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 must be at least 1"),
        ({"num_virtual_tokens": 2.5}, "num_virtual_tokens=2.5 must be int"),
        ({"prompt_tuning_init": "TEXTS"}, "prompt_tuning_init='TEXTS' must be .*did you mean 'TEXT'"),
        ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text=None must be a text"),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": ""}, "prompt_tuning_init_text='' must be a text"),
        ({"prompt_tuning_init_text": "Yes"}, "prompt_tuning_init_text='Yes' is for prompt_tuning_init='TEXT'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.compile(message)):
        PromptTuningConfig(**settings)
