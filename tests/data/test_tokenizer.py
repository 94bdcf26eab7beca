"""``load_tokenizer`` on Hugging Face folders, against transformers' own tokenizers."""

import shutil

import pytest
import tokenizers
from hypothesis import given, settings
from tokenizer_makers import (
    AWKWARD,
    byte_level_bpe,
    put_bos_before,
    sentencepiece_model,
    texts,
    write_folder,
    write_gguf,
)
from tokenizers import AddedToken
from transformers import AutoTokenizer

from moe_peft.data.tokenizer import load_tokenizer

SPECIALS = ["<unk>", "<s>", "</s>", "<|end|>"]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}",
}


@pytest.fixture(scope="module")
def bpe():
    return byte_level_bpe(SPECIALS)


@pytest.fixture(scope="module")
def pair(bpe, tmp_path_factory):
    """Ours and transformers', from one folder."""
    tokenizer = tokenizers.Tokenizer.from_str(bpe.to_str())
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    put_bos_before(tokenizer, "<s>")
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    folder = write_folder(tmp_path_factory.mktemp("hf"), tokenizer, tokenizer_config=CONFIG)
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=150)
@given(text=texts(*SPECIALS, "<think>"))
def test_folder_equals_transformers(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text, padding=False)
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False, padding=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == "<s>" + text


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_equals_transformers(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text, padding=False)


def test_properties(pair, bpe):
    ours, theirs = pair
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.unk_token_id is None
    assert ours.eos_token_ids == (2,)
    assert ours.prefix_ids == (1,)
    assert ours.vocab_size == len(theirs) == bpe.get_vocab_size() + 1
    assert ours.special_ids == {token: i for i, token in enumerate(SPECIALS)}
    assert ours.chat_template == CONFIG["chat_template"]


def test_chat_template_equals_transformers(pair):
    ours, theirs = pair
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello </s>", "name": None}]
    text = ours.apply_chat_template(messages, tokenize=False)
    assert text == theirs.apply_chat_template(messages, tokenize=False)
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, padding=False)
    assert ours.apply_chat_template(messages) == ids


# transformers' fast tokenizers leave it to the post-processor of the file what stands around a text.
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_tokens_around_a_text_equal_transformers(bpe, tmp_path, flags, processed, tokenizer_class):
    tokenizer = tokenizers.Tokenizer.from_str(bpe.to_str())
    if processed:
        put_bos_before(tokenizer, "<s>")
    config = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        **flags,
    }
    folder = write_folder(tmp_path, tokenizer, tokenizer_config=config)
    ours = load_tokenizer(folder)
    assert ours.encode("the cat") == AutoTokenizer.from_pretrained(folder).encode("the cat")
    assert ours.prefix_ids == ((1,) if processed else ())


def test_tokens_that_only_the_config_knows_equal_transformers(bpe, tmp_path):
    config = {
        **CONFIG,
        "pad_token": {"__type": "AddedToken", "content": "<pad>", "lstrip": True},
        "additional_special_tokens": ["<tool>"],
        "added_tokens_decoder": {
            str(bpe.get_vocab_size()): {"content": "<new>", "special": False, "normalized": False}
        },
    }
    folder = write_folder(tmp_path, bpe, tokenizer_config=config)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("a<pad>b", "a <pad>b", "<tool>x", "x<new>y", "<new><tool><pad>"):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.pad_token_id == theirs.pad_token_id


def test_special_tokens_map_and_old_added_tokens(bpe, tmp_path):
    size = bpe.get_vocab_size()
    folder = write_folder(
        tmp_path,
        bpe,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<s>"},
        special_tokens_map={"eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<unk>"},
        added_tokens={"<extra>": size},
    )
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token_id == theirs.eos_token_id == 2
    assert ours.unk_token_id == theirs.unk_token_id == 0
    assert ours.encode("a<extra>b") == theirs.encode("a<extra>b")


def test_split_special_tokens_equals_transformers(bpe, tmp_path):
    folder = write_folder(tmp_path, bpe, tokenizer_config={**CONFIG, "split_special_tokens": True})
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("a</s>b") == theirs.encode("a</s>b") != bpe.encode("a</s>b").ids


def test_all_end_tokens_come_from_the_generation_config(bpe, tmp_path):
    folder = write_folder(
        tmp_path, bpe, tokenizer_config=CONFIG, generation_config={"eos_token_id": [3, 2]}, config={"eos_token_id": 0}
    )
    assert load_tokenizer(folder).eos_token_ids == (2, 3)
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(folder).eos_token_ids == (2, 0)


def test_a_folder_without_tokenizer_config_takes_its_ids_from_the_model_config(bpe, tmp_path):
    folder = write_folder(tmp_path, bpe, config={"eos_token_id": 2, "bos_token_id": 1})
    ours = load_tokenizer(folder)
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
    assert ours.prefix_ids == ()


@pytest.mark.parametrize("null", [None, ""])
def test_a_null_token_is_none(bpe, tmp_path, null):
    folder = write_folder(tmp_path, bpe, tokenizer_config={**CONFIG, "bos_token": null}, config={"bos_token_id": 1})
    assert load_tokenizer(folder).bos_token_id is None


def test_chat_template_file_wins(bpe, tmp_path):
    folder = write_folder(tmp_path, bpe, tokenizer_config=CONFIG)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}ß", encoding="utf-8")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.chat_template == theirs.chat_template == "{{ messages[0].content }}ß"


def test_of_several_chat_templates_the_default_one_counts(bpe, tmp_path):
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert (
        load_tokenizer(write_folder(tmp_path, bpe, tokenizer_config={"chat_template": templates})).chat_template == "y"
    )


def test_a_tokenizer_file_may_be_named_itself(bpe, tmp_path):
    folder = write_folder(tmp_path, bpe, tokenizer_config=CONFIG)
    assert load_tokenizer(folder / "tokenizer.json").encode("the") == load_tokenizer(str(folder)).encode("the")


def test_tokenizer_json_is_preferred(bpe, tmp_path):
    folder = write_folder(tmp_path, bpe, tokenizer_config=CONFIG)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    assert load_tokenizer(folder).encode("the cat") == bpe.encode("the cat").ids


def test_a_text_with_half_a_surrogate_pair_is_refused(pair):
    with pytest.raises(ValueError, match="character 2 of the text is half of a surrogate pair"):
        pair[0].encode("ab\ud800")


def test_no_chat_template(bpe, tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path, bpe))
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json is not a tokenizer that the tokenizers library can read"),
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must hold a mapping, not list"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token=3 must be the text of a token"),
        ("tokenizer_config.json", '{"legacy": 1}', "legacy=1 must be true or false, not int"),
        ("tokenizer_config.json", '{"additional_special_tokens": "<x>"}', "must be a list, not str"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "must map ids to tokens"),
        ("tokenizer_config.json", '{"chat_template": 1}', "chat_template=1 must be a string"),
        ("special_tokens_map.json", '{"pad_token": {}}', "pad_token=None must be the text of a token"),
        ("added_tokens.json", '{"<x>": "y"}', "<x>='y' must be an id, not str"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id='x' must be an id or a list of ids"),
    ],
)
def test_bad_files_are_named(bpe, tmp_path, file, content, message):
    folder = write_folder(tmp_path, bpe)
    (folder / file).write_text(content)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(folder)
    assert message in str(caught.value)
    assert file in str(caught.value)


def test_missing_files(tmp_path, bpe):
    with pytest.raises(ValueError, match=r"holds no tokenizer: it must have a tokenizer\.json or a tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    other = tmp_path / "vocab.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match=r"the file must be named tokenizer\.json"):
        load_tokenizer(other)
    shutil.copy(write_gguf(tmp_path / "x.gguf", model="bert"), tmp_path / "bert.gguf")
    with pytest.raises(ValueError, match="'bert' is not supported"):
        load_tokenizer(tmp_path / "bert.gguf")
