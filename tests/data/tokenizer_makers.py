"""Small tokenizer files made with the libraries that own the formats, and text to try them on."""

import io
import json
from pathlib import Path

import gguf
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "The cat sat on the mat, and the dog didn't mind: it's 12345 o'clock.",
    "def answer(question: str) -> str:\n    return question[::-1]  # reversed\n\n\nprint(answer('42'))",
    "Héllo wörld, naïve café — “quotes” … ÅNGSTRÖM ñandú.",
    "こんにちは世界。漢字とかな。 Привет, мир! مرحبا بالعالم 🙂🙃👩‍👩‍👧",
    "  leading and   inner    white space\t\ttabs \n\n newlines \r\n too  ",
    "I'LL we've THEY'RE x² ½ Ⅷ ٣٤٥ 1,000.50 $9.99 a+b=c <tag> {json: [1, 2]}",
] * 20

AWKWARD = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n \n",
    "\t\tx",
    " hello",
    "hello ",
    "hello  world",
    "a\r\nb",
    "2024-01-31 12:59 1234567890",
    "x² ½ Ⅷ ٣٤٥ ①",
    "Don't DON'T we'll WE'LL 's",
    "for i in range(10):\n\tprint(f'{i:>3}')\n",
    "e\u0301 \u00e9 \u212b ﬁ Ａ",  # what normal forms change
    "👩‍👩‍👧 🏳️‍🌈 \u200b\ufeff\u00a0\u3000",
    "\x00\x01\x7f\x80",
    "漢字かな交じり文とПривет",
    "</s><s>",
    "<s> a <s>b</s> c </s>\n",
    "a<|end|>b <|end|>\n<|end|>",
    "<unk> <pad>",
]

# Letters, digits, white space, code, and whatever else Unicode has, but no lone surrogates: those are no text.
PLAIN = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
WORDY = st.lists(
    st.sampled_from(
        ["the", " cat", "it's", "\n", "\n\n", " ", "   ", "\t", "42", "007", "é", "漢", "🙂", "def f(x):", "_"]
    ),
    max_size=12,
).map("".join)


def texts(*specials: str) -> st.SearchStrategy[str]:
    """Random text with special tokens strewn in."""
    parts = PLAIN | WORDY | st.sampled_from(["x", *specials])
    return st.lists(parts, max_size=5).map("".join)


def byte_level_bpe(special_tokens: list[str], vocab_size: int = 420, **model: object) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer, trained here."""
    tokenizer = tokenizers.Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def put_bos_before(tokenizer: tokenizers.Tokenizer, bos: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def write_folder(folder: Path, tokenizer: tokenizers.Tokenizer | None = None, **files: object) -> Path:
    """A Hugging Face folder; ``files`` are JSON by stem."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def sentencepiece_model(**options: object) -> bytes:
    """A sentencepiece model of LLaMA's kind, trained here."""
    settings: dict[str, object] = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.split("\n")]),
        model_writer=file,
        **{**settings, **options},
    )
    return file.getvalue()


def write_gguf(path: Path, **keys: object) -> Path:
    """A GGUF file without tensors; ``keys`` stand under ``tokenizer.ggml.``, but a ``chat_template`` above it."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def gguf_keys(tokenizer: tokenizers.Tokenizer) -> dict[str, object]:
    """What a conversion writes of a byte-level BPE tokenizer: tokens, their types and merges."""
    state = json.loads(tokenizer.to_str())
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = {entry["id"]: 3 if entry["special"] else 4 for entry in state["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    return {
        "tokens": [by_id[i] for i in range(len(by_id))],
        "token_type": [added.get(i, 1) for i in range(len(by_id))],
        "merges": merges,
    }
