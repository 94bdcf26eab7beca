"""``tokenizer.model`` files, against the sentencepiece library and transformers' slow tokenizer on top of it."""

import json
import re

import pytest
import sentencepiece
from hypothesis import given, settings
from tokenizer_makers import AWKWARD, sentencepiece_model, texts, write_folder
from tokenizers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend as SlowTokenizer

from moe_peft.data.tokenizer import load_tokenizer

MODELS = {
    "llama": {},
    "unigram": {"model_type": "unigram", "hard_vocab_limit": False},
    "normalizing": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no_bytes": {"byte_fallback": False, "character_coverage": 1.0},
    "no_space": {"add_dummy_prefix": False},
    "user_symbols": {"user_defined_symbols": ["<|user|>", "    "], "control_symbols": ["<ctrl>"]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """For every kind of model its folder and sentencepiece's own processor."""
    made = {}
    for name, options in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(**options))
        made[name] = folder, sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return made


@pytest.mark.parametrize("kind", MODELS)
@settings(deadline=None, max_examples=80)
@given(text=texts("<|user|>"))
def test_plain_text_equals_sentencepiece(models, kind, text):
    folder, theirs = models[kind]
    ours = loaded(folder)
    ids = theirs.encode(text)
    assert ours.encode(text, add_special_tokens=False) == ids
    assert ours.encode(text) == [1, *ids]
    if theirs.unk_id() not in ids:  # special here, as in transformers; sentencepiece makes it " ⁇ "
        assert ours.decode(ids) == theirs.decode(ids)
    if kind in ("llama", "unigram", "no_space", "user_symbols") and "▁" not in text and "\x00" not in text:
        assert ours.decode(ids) == text


_LOADED = {}


def loaded(folder):
    if folder not in _LOADED:
        _LOADED[folder] = load_tokenizer(folder)
    return _LOADED[folder]


@pytest.mark.parametrize("kind", MODELS)
def test_awkward_text_equals_sentencepiece(models, kind):
    folder, theirs = models[kind]
    for text in [text for text in AWKWARD if "<" not in text]:
        assert loaded(folder).encode(text, add_special_tokens=False) == theirs.encode(text), repr(text)


NAMED = {
    name: AddedToken(text, special=True, normalized=False)
    for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
}


@pytest.fixture(scope="module")
def legacy_pair(models):
    folder, _ = models["llama"]
    return loaded(folder), SlowTokenizer(vocab_file=str(folder / "tokenizer.model"), legacy=True, **NAMED)


@settings(deadline=None, max_examples=150)
@given(text=texts("<s>", "</s>", "<unk>"))
def test_special_tokens_equal_transformers(legacy_pair, text):
    ours, theirs = legacy_pair
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs.convert_tokens_to_ids(theirs.tokenize(text))
    if "▁" not in text and "\x00" not in text:
        assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_equals_transformers(legacy_pair, text):
    ours, theirs = legacy_pair
    assert ours.encode(text, add_special_tokens=False) == theirs.convert_tokens_to_ids(theirs.tokenize(text))


@pytest.fixture(scope="module")
def modern_pair(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("modern"), tokenizer_config={"legacy": False})
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return load_tokenizer(folder), sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def without_space_in_front(processor, text):
    """Nothing is merged with a character that the vocabulary lacks, so it can stand for the beginning."""
    return processor.encode("\x02" + text)[len(processor.encode("\x02")) :]


@settings(deadline=None, max_examples=150)
@given(text=texts("<s>", "</s>", "<unk>"))
def test_without_legacy_only_the_text_s_beginning_gets_a_space(modern_pair, text):
    ours, theirs = modern_pair
    expected = []
    for index, part in enumerate(re.split("(<s>|</s>|<unk>)", text)):
        if index % 2:
            expected.append(theirs.piece_to_id(part))
        elif part:
            expected += without_space_in_front(theirs, part if index else " " + part)
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == expected
    if "▁" not in text and "\x00" not in text:
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_where_a_stretch_after_a_special_token_begins(legacy_pair, modern_pair):
    (legacy, _), (modern, _) = legacy_pair, modern_pair
    assert legacy.encode("</s>the", add_special_tokens=False) == [2, *legacy.encode("the", add_special_tokens=False)]
    assert modern.encode("</s>the", add_special_tokens=False) != [2, *modern.encode("the", add_special_tokens=False)]
    assert legacy.encode("the") == modern.encode("the")


def test_properties(models):
    folder, theirs = models["user_symbols"]
    ours = loaded(folder)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.unk_token_id) == (1, 2, None, 0)
    assert ours.eos_token_ids == (2,)
    assert ours.vocab_size == theirs.get_piece_size()
    control = theirs.piece_to_id("<ctrl>")
    assert ours.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2, "<ctrl>": control}
    assert ours.encode("<ctrl>", add_special_tokens=False) == [control]
    assert ours.decode([1, control, *theirs.encode("the")]) == "the"


def write_model(folder, **files):
    write_folder(folder, **files)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"bos_token": None}, [], []),
    ],
)
def test_flags(tmp_path, flags, before, after):
    tokenizer = load_tokenizer(write_model(tmp_path, tokenizer_config=flags))
    plain = tokenizer.encode("the cat", add_special_tokens=False)
    assert tokenizer.encode("the cat") == [*before, *plain, *after]
    assert tokenizer.prefix_ids == tuple(before)


def test_added_tokens(tmp_path):
    config = {
        "eos_token": "<|end|>",
        "pad_token": "<pad>",
        "added_tokens_decoder": {
            "420": {"content": "<|end|>", "special": True},
            "421": {"content": "<think>", "special": False, "lstrip": True},
        },
    }
    tokenizer = load_tokenizer(
        write_model(tmp_path, tokenizer_config=config, generation_config={"eos_token_id": [2, 420]})
    )
    assert tokenizer.eos_token_ids == (420, 2)
    assert tokenizer.pad_token_id == 422
    assert tokenizer.vocab_size == 423
    cat = tokenizer.encode("cat", add_special_tokens=False)
    assert tokenizer.encode("cat  <think>cat<|end|><pad>") == [1, *cat, 421, *cat, 420, 422]
    assert tokenizer.decode([1, *cat, 421, *cat, 420, 422]) == "cat<think>cat"
    assert tokenizer.decode([420, 421], skip_special_tokens=False) == "<|end|><think>"


def test_split_special_tokens(tmp_path):
    tokenizer = load_tokenizer(write_model(tmp_path, tokenizer_config={"split_special_tokens": True}))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer.encode("a</s>b") == [1, *theirs.encode("a</s>b")]


def test_chat_template(tmp_path):
    config = {"chat_template": "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"}
    tokenizer = load_tokenizer(write_model(tmp_path, tokenizer_config=config))
    messages = [{"role": "user", "content": "the cat"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>[INST] the cat [/INST]"
    ids = tokenizer.encode("[INST] the cat [/INST]", add_special_tokens=False)
    assert tokenizer.apply_chat_template(messages) == [1, *ids]


def test_ids_beyond_the_vocabulary_have_no_text(models):
    ours = loaded(models["llama"][0])
    assert ours.decode([*ours.encode("the"), 9999, -1]) == "the"


def test_the_file_may_be_named_itself(models):
    folder, _ = models["llama"]
    assert load_tokenizer(folder / "tokenizer.model").encode("the") == loaded(folder).encode("the")


@pytest.mark.parametrize("content", [b"", b"not a model", json.dumps({"a": 1}).encode()])
def test_a_broken_model_is_named(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model"):
        load_tokenizer(tmp_path)
