"""Tokenizers written as files of a Hugging Face folder: transformers and this project read the same ids out of them."""

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from tokenizer_makers import AWKWARD, byte_level_bpe, gguf_keys, sentencepiece_model, texts, write_folder, write_gguf

from moe_peft.data.tokenizer import load_tokenizer
from moe_peft.data.tokenizer_files import tokenizer_files
from moe_peft.io.smollm2 import smollm2_file

SPECIALS = ["<s>", "</s>", "<|end|>"]
CHAT = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


def written(folder, tokenizer, **config):
    """The folder's tokenizer as transformers and as this project read it."""
    write_folder(folder, config={"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config})
    for name, text in tokenizer_files(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)


def assert_same(tokenizer, theirs, ours, text):
    expected = tokenizer.encode(text)
    assert theirs(text).input_ids == expected, repr(text)
    assert ours.encode(text) == expected, repr(text)
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert theirs(text, add_special_tokens=False).input_ids == plain, repr(text)
    for skip in (False, True):
        decoded = tokenizer.decode(expected, skip_special_tokens=skip)
        assert theirs.decode(expected, skip_special_tokens=skip) == decoded, repr(text)
        assert ours.decode(expected, skip_special_tokens=skip) == decoded, repr(text)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    tokenizer = load_tokenizer(smollm2_file())
    return tokenizer, *written(tmp_path_factory.mktemp("smollm2"), tokenizer)


@settings(deadline=None, max_examples=100)
@given(text=texts("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
def test_smollm2(smollm2, text):
    assert_same(*smollm2, text)


def test_smollm2s_names_and_template(smollm2):
    tokenizer, theirs, ours = smollm2
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    assert ours.apply_chat_template(messages, add_generation_prompt=True) == expected
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(theirs, name) == getattr(ours, name) == getattr(tokenizer, name), name
    assert len(theirs) == ours.vocab_size == tokenizer.vocab_size
    assert ours.special_tokens == tokenizer.special_tokens
    assert ours.special_ids == tokenizer.special_ids


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """With tokens before and after every text."""
    folder = tmp_path_factory.mktemp("bytes")
    keys = {**gguf_keys(byte_level_bpe(SPECIALS)), "bos_token_id": 0, "eos_token_id": 1, "chat_template": CHAT}
    tokenizer = load_tokenizer(
        write_gguf(folder / "model.gguf", model="gpt2", pre="llama-bpe", add_eos_token=True, **keys)
    )
    return tokenizer, *written(folder, tokenizer)


@settings(deadline=None, max_examples=80)
@given(text=texts(*SPECIALS))
def test_byte_level_with_tokens_around(byte_level, text):
    assert_same(*byte_level, text)


def test_what_is_around_a_text(byte_level):
    tokenizer, theirs, ours = byte_level
    assert theirs("a").input_ids[::2] == ours.encode("a")[::2] == tokenizer.encode("a")[::2] == [0, 1]
    assert ours.prefix_ids == tokenizer.prefix_ids == (0,)
    messages = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "<s>Hi</s>"


def sentencepiece_keys(model):
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    kinds = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    ids = range(processor.get_piece_size())
    return {
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [float(processor.get_score(i)) for i in ids],
        "token_type": [next((kind for name, kind in kinds.items() if getattr(processor, name)(i)), 1) for i in ids],
    }


@pytest.fixture(scope="module", params=[True, False], ids=["space_before", "none_before"])
def pieces(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    path = write_gguf(
        folder / "model.gguf",
        model="llama",
        add_space_prefix=request.param,
        chat_template=CHAT,
        **sentencepiece_keys(sentencepiece_model()),
    )
    tokenizer = load_tokenizer(path)
    return tokenizer, *written(folder, tokenizer)


@settings(deadline=None, max_examples=100)
@given(text=texts("<s>", "</s>"))
def test_sentencepiece_ids(pieces, text):
    tokenizer, theirs, ours = pieces
    for add in (True, False):
        expected = tokenizer.encode(text, add)
        assert theirs(text, add_special_tokens=add).input_ids == expected
        assert ours.encode(text, add) == expected


@pytest.mark.parametrize("text", AWKWARD)
def test_sentencepiece_on_awkward_text(pieces, text):
    tokenizer, theirs, ours = pieces
    assert theirs(text).input_ids == ours.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["Hello world", "The cat sat", "naïve 漢字 🙂", "12 x"])
def test_sentencepiece_decodes(pieces, text):
    tokenizer, theirs, ours = pieces
    ids = tokenizer.encode(text)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == tokenizer.decode(ids) == text


def test_a_vocabulary_that_no_pipeline_cuts_alike_is_refused(tmp_path):
    """sentencepiece matches a user's pieces within the text, where the library would begin a new stretch of it."""
    keys = sentencepiece_keys(sentencepiece_model())
    word = next(i for i, piece in enumerate(keys["tokens"]) if len(piece) > 1 and piece.isascii() and piece.isalpha())
    keys["token_type"][word] = 4
    tokenizer = load_tokenizer(write_gguf(tmp_path / "model.gguf", model="llama", **keys))
    with pytest.raises(ValueError, match=r"the tokenizer of .*model\.gguf cannot be written as tokenizer\.json: for"):
        tokenizer_files(tokenizer)
