"""The tokenizer of a base model, whatever file it comes from."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from moe_peft.data.tokenizer_parts import TokenizerParts
from moe_peft.io.source import BUILT_IN_MODELS, resolve_source

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Turns text into token ids and back, and conversations into prompts.

    Args:
        parts: what ``load_tokenizer`` has read.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._backend = parts.backend

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of ``text``.

        Args:
            text: any Unicode text; the text of a special token becomes that token.
            add_special_tokens: put the tokens around it that this tokenizer puts around a text (``prefix_ids``, ...).

        Raises:
            ValueError: when ``text`` holds half of a surrogate pair, which no encoding of text can hold.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text is half of a surrogate pair: no text at all"
            ) from None
        return self._backend.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ``ids``; ids outside of the vocabulary have none."""
        return self._backend.decode(ids, skip_special_tokens)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = ...,
        tokenize: Literal[True] = ...,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = ..., tokenize: Literal[False]
    ) -> str: ...

    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = ..., tokenize: bool
    ) -> list[int] | str: ...

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, tokenize: bool = True
    ) -> list[int] | str:
        """Returns a conversation in the model's own chat format.

        Args:
            messages: ``role`` and ``content`` of every turn.
            add_generation_prompt: end with the opening of an assistant turn.
            tokenize: return ids rather than text; the template writes every special token itself.

        Raises:
            ValueError: when the tokenizer has no chat template, or the template fails.
        """
        if self.chat_template is None:
            raise ValueError(f"the tokenizer of {self._parts.origin} has no chat template")
        from moe_peft.data.chat_template import render_chat  # and jinja2 with it, which only conversations need

        text = render_chat(
            self.chat_template,
            messages,
            special_tokens=self._parts.special_tokens,
            add_generation_prompt=add_generation_prompt,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    @property
    def chat_template(self) -> str | None:
        """Jinja source."""
        return self._parts.chat_template

    @property
    def origin(self) -> str:
        """The file or folder it was read from, for messages."""
        return self._parts.origin

    def to_tokenizers(self) -> "tokenizers.Tokenizer":
        """The same as one pipeline of the ``tokenizers`` library, or the nearest that there is."""
        return self._backend.to_tokenizers()

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The text of ``bos_token``, ``eos_token``, …, as far as this tokenizer has them."""
        return self._parts.special_tokens

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The text and the id of every special token, named or not."""
        return self._backend.special_ids

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end an answer; ``eos_token_id`` first."""
        return self._parts.eos_token_ids

    @property
    def vocab_size(self) -> int:
        """The largest id + 1, added tokens included."""
        return self._backend.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._named_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._named_id("unk_token")

    def _named_id(self, name: str) -> int | None:
        text = self._parts.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids that ``encode`` puts before every text: the first token, or nothing."""
        alone, around = self.encode("a", add_special_tokens=False), self.encode("a")
        starts = range(len(around) - len(alone) + 1)
        start = next((i for i in starts if around[i : i + len(alone)] == alone), 0)
        return tuple(around[:start])


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Returns the tokenizer of a base model.

    Args:
        source: a Hugging Face folder with ``tokenizer.json`` or ``tokenizer.model`` (config.json is not needed), one of
            these two files itself, a ``.gguf`` file, a hub id, or the built-in name ``smollm2-135m``.

    Raises:
        FileNotFoundError: when there is no such file or folder.
        ValueError: when it holds no tokenizer, or one that cannot be understood.
    """
    # The readers bring the tokenizers library with them, which nothing else needs.
    from moe_peft.data.gguf_tokenizer import read_gguf_tokenizer
    from moe_peft.data.hf_tokenizer import read_hf_tokenizer
    from moe_peft.data.sentencepiece_tokenizer import read_sentencepiece_tokenizer

    path = Path(source).expanduser()
    if source in BUILT_IN_MODELS or not (path.is_dir() or (path.is_file() and path.suffix in (".json", ".model"))):
        path = resolve_source(source)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return Tokenizer(read_gguf_tokenizer(path))
    if path.is_file() and path.suffix == ".model":
        return Tokenizer(read_sentencepiece_tokenizer(path))
    if path.is_file() and path.name != "tokenizer.json":
        raise ValueError(f"{path} holds no tokenizer: the file must be named tokenizer.json")
    folder = path.parent if path.is_file() else path
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(read_hf_tokenizer(folder))
    if (folder / "tokenizer.model").is_file():
        return Tokenizer(read_sentencepiece_tokenizer(folder / "tokenizer.model"))
    raise ValueError(f"the folder {folder} holds no tokenizer: it must have a tokenizer.json or a tokenizer.model")
