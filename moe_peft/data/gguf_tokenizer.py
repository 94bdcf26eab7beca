"""A tokenizer from the metadata of a GGUF file."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from moe_peft.data.sentencepiece_model import sentencepiece_bpe_model
from moe_peft.data.sentencepiece_tokenizer import SentencePieceBackend, load_processor
from moe_peft.data.tokenizer_parts import Backend, FastBackend, TokenizerParts
from moe_peft.io.gguf_file import read_gguf_metadata
from moe_peft.strict import kind, nearest, show

# The kinds of tokens; GGUF took their numbers from sentencepiece.
_TOKEN_TYPES = range(1, 7)
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_MATCHED_WHOLE = (_UNKNOWN, _CONTROL, _USER_DEFINED)

_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class _PreTokenizer:
    """How text is cut before byte-level BPE.

    Args:
        splits: applied one after the other, each to the pieces that the one before has left.
        ignore_merges: a piece that is a token as a whole is taken whole.
        add_bos: whether a text begins with the first token where the file does not say.
        nfc: whether text is brought into normal form C first.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_LLAMA3_PRE = _PreTokenizer(splits=(_LLAMA3,), ignore_merges=True, add_bos=True)

# By `tokenizer.ggml.pre`, as in llama.cpp's llama-vocab.cpp, with the regexes of the tokenizers that they stand for.
_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    "default": _PreTokenizer(splits=(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _PreTokenizer(splits=(_GPT2,)),
    "smollm": _PreTokenizer(splits=(_DIGIT, _GPT2)),
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    # llama.cpp leaves the text as it is, but Qwen's own tokenizer, and so its training, is in normal form C.
    "qwen2": _PreTokenizer(splits=(_QWEN2,), nfc=True),
    "deepseek-r1-qwen": _PreTokenizer(splits=(_QWEN2,)),
    "tekken": _PreTokenizer(splits=(_TEKKEN,), ignore_merges=True, add_bos=True),
}


def read_gguf_tokenizer(path: Path) -> TokenizerParts:
    """Reads the vocabulary, the special tokens and the chat template of a GGUF file.

    Raises:
        ValueError: naming the file and the key, when there is no tokenizer, it is of a kind that is not known here, or
            its data does not fit together.
    """
    metadata = _Metadata(path, read_gguf_metadata(path))
    model = metadata.get("model", str)
    if model is None:
        raise ValueError(f"{path} holds no tokenizer: it has no tokenizer.ggml.model")
    if model not in _READERS:
        raise ValueError(f"{path}: tokenizer.ggml.model={model!r} is not supported{nearest(model, _READERS)}")
    backend, named_ids = _READERS[model](metadata)
    ends = [named_ids.get("eos_token"), metadata.token_id("eot_token_id"), metadata.token_id("eom_token_id")]
    chat_template = metadata.values.get("tokenizer.chat_template")
    return TokenizerParts(
        backend=backend,
        special_tokens={name: metadata.tokens[token_id] for name, token_id in named_ids.items()},
        eos_token_ids=tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None)),
        chat_template=chat_template if isinstance(chat_template, str) else None,
        origin=str(path),
    )


class _Metadata:
    """The ``tokenizer.ggml.*`` keys of a file, checked as they are read."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def get(self, key: str, wanted: type) -> Any:
        value = self.values.get(f"tokenizer.ggml.{key}")
        if value is not None and not isinstance(value, wanted):
            raise ValueError(f"{self.path}: tokenizer.ggml.{key}={show(value)} must not be a {kind(value)}")
        return value

    def strings(self, key: str) -> list[str]:
        values = self.get(key, list)
        if not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self.path}: tokenizer.ggml.{key} must be a list of strings")
        return values

    @cached_property
    def tokens(self) -> list[str]:
        tokens = self.strings("tokens")
        first_ids: dict[str, int] = {}
        for token_id, token in enumerate(tokens):
            if first_ids.setdefault(token, token_id) != token_id:
                twice = f"{first_ids[token]} and {token_id}"
                raise ValueError(f"{self.path}: tokenizer.ggml.tokens has {token!r} twice, as ids {twice}")
        return tokens

    @cached_property
    def token_types(self) -> list[int]:
        types = self._one_a_token("token_type", _NORMAL)
        wrong = next((value for value in types if value not in _TOKEN_TYPES), None)
        if wrong is not None:
            raise ValueError(f"{self.path}: tokenizer.ggml.token_type has {show(wrong)}: it must be in 1..6")
        return types

    @property
    def scores(self) -> list[float]:
        return self._one_a_token("scores", 0.0)

    def _one_a_token(self, key: str, default: float) -> list[Any]:
        values = self.get(key, list)
        if values is None:
            return [default] * len(self.tokens)
        if len(values) != len(self.tokens) or not all(isinstance(value, (int, float)) for value in values):
            raise ValueError(
                f"{self.path}: tokenizer.ggml.{key} must hold a number for each of the {len(self.tokens)} tokens, "
                f"but has {len(values)} values"
            )
        return values

    def token_id(self, key: str) -> int | None:
        token_id = self.get(key, int)
        if token_id is not None and not 0 <= token_id < len(self.tokens):
            raise ValueError(
                f"{self.path}: tokenizer.ggml.{key}={token_id} must be below the {len(self.tokens)} tokens"
            )
        return token_id

    def named_ids(self, **defaults: int) -> dict[str, int]:
        """The ids of ``bos_token``, …; ``defaults`` are those that llama.cpp takes where a file says nothing."""
        keys = {
            "bos_token": "bos_token_id",
            "eos_token": "eos_token_id",
            "unk_token": "unknown_token_id",
            "sep_token": "seperator_token_id",
            "pad_token": "padding_token_id",
            "mask_token": "mask_token_id",
        }
        ids = {name: self.token_id(key) for name, key in keys.items()}
        ids |= {name: i for name, i in defaults.items() if ids[name] is None and i < len(self.tokens)}
        return {name: token_id for name, token_id in ids.items() if token_id is not None}

    def added_tokens(self, named_ids: Mapping[str, int]) -> dict[int, AddedToken]:
        """The tokens that are matched whole in a text, by id."""
        types = {i: token_type for i, token_type in enumerate(self.token_types) if token_type in _MATCHED_WHOLE}
        types |= dict.fromkeys(named_ids.values(), _CONTROL)
        return {
            i: AddedToken(self.tokens[i], special=types[i] != _USER_DEFINED, normalized=False) for i in sorted(types)
        }

    def around(self, named_ids: Mapping[str, int], *, add_bos: bool) -> tuple[list[int], list[int]]:
        """The ids before and after every text; ``add_bos`` is what counts where the file does not say."""
        wanted = {"bos_token": self.get("add_bos_token", bool), "eos_token": self.get("add_eos_token", bool)}
        if wanted["bos_token"] is None:
            wanted["bos_token"] = add_bos
        bos, eos = ([named_ids[name]] if wanted[name] and name in named_ids else [] for name in wanted)
        return bos, eos


def _read_byte_level(metadata: _Metadata) -> tuple[Backend, dict[str, int]]:
    name = metadata.get("pre", str)
    if name is None:
        warnings.warn(
            f"{metadata.path} does not say how its tokenizer cuts text (no tokenizer.ggml.pre): it is an old "
            "conversion, and is read as 'default', which may not be what the model was trained with",
            stacklevel=2,
        )
        name = "default"
    if name not in _PRE_TOKENIZERS:
        valid = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ValueError(f"{metadata.path}: tokenizer.ggml.pre={name!r} is not supported; valid here: {valid}")
    pre = _PRE_TOKENIZERS[name]
    vocab = {token: token_id for token_id, token in enumerate(metadata.tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in metadata.strings("merges"))]
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{metadata.path}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*map(_split, pre.splits), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    named_ids = metadata.named_ids()
    tokenizer.add_tokens(list(metadata.added_tokens(named_ids).values()))
    prefix, suffix = metadata.around(named_ids, add_bos=pre.add_bos)
    return FastBackend(tokenizer, prefix, suffix), named_ids


def _split(pattern: str) -> Any:
    if pattern == _DIGIT:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _read_sentencepiece(metadata: _Metadata) -> tuple[Backend, dict[str, int]]:
    model = sentencepiece_bpe_model(
        metadata.tokens,
        metadata.scores,
        metadata.token_types,
        add_dummy_prefix=metadata.get("add_space_prefix", bool) is not False,
        remove_extra_whitespaces=metadata.get("remove_extra_whitespaces", bool) is True,
    )
    processor = load_processor(model, f"the vocabulary of {metadata.path}")
    named_ids = metadata.named_ids(bos_token=1, eos_token=2, unk_token=0)
    # sentencepiece itself matches the pieces that a user defined.
    added = {i: token for i, token in metadata.added_tokens(named_ids).items() if token.special}
    prefix, suffix = metadata.around(named_ids, add_bos=True)
    return SentencePieceBackend(processor, added, prefix=prefix, suffix=suffix), named_ids


_READERS: dict[str, Callable[[_Metadata], tuple[Backend, dict[str, int]]]] = {
    "gpt2": _read_byte_level,
    "llama": _read_sentencepiece,
}
