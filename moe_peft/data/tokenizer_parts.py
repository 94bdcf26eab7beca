"""What every tokenizer file is read into, whatever its format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import tokenizers

# The names under which Hugging Face files, chat templates and we speak of special tokens.
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Backend(Protocol):
    """Text to ids and back: the ``tokenizers`` or the ``sentencepiece`` library underneath."""

    @property
    def vocab_size(self) -> int:
        """The largest id + 1, added tokens included."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The text of every special token and its id."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def token_to_id(self, token: str) -> int | None: ...

    def to_tokenizers(self) -> "tokenizers.Tokenizer":
        """The whole behaviour as one pipeline of the ``tokenizers`` library, or the nearest that there is."""


@dataclass(frozen=True, kw_only=True)
class TokenizerParts:
    """A tokenizer as read from its files.

    Args:
        backend: turns text into ids.
        special_tokens: the text of ``bos_token``, ``eos_token``, …: what a chat template may write by these names.
        eos_token_ids: the ids that end an answer, the end token of the vocabulary first.
        chat_template: Jinja source, or None.
        origin: the file or folder, for messages.
    """

    backend: Backend
    special_tokens: Mapping[str, str]
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    origin: str


class FastBackend:
    """The ``tokenizers`` library.

    Args:
        tokenizer: the pipeline; its own post-processor puts special tokens around a text.
        prefix: ids put before a text beyond what the post-processor does, where the file has none.
        suffix: ids put after it, likewise.
    """

    def __init__(
        self, tokenizer: "tokenizers.Tokenizer", prefix: Sequence[int] = (), suffix: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._prefix, self._suffix = list(prefix), list(suffix)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: token_id for token_id, token in sorted(added.items()) if token.special}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def to_tokenizers(self) -> "tokenizers.Tokenizer":
        import tokenizers

        pipeline = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        if self._prefix or self._suffix:
            pipeline.post_processor = ids_around(pipeline, self._prefix, self._suffix)
        return pipeline


def ids_around(pipeline: "tokenizers.Tokenizer", prefix: Sequence[int], suffix: Sequence[int]) -> Any:
    """A post-processor that puts these ids before and after a text."""
    from tokenizers import processors

    pieces = {token_id: pipeline.id_to_token(token_id) for token_id in (*prefix, *suffix)}
    before, after = ([pieces[token_id] for token_id in ids] for ids in (prefix, suffix))
    single = [*(f"{piece}:0" for piece in before), "$A:0", *(f"{piece}:0" for piece in after)]
    pair = [*(f"{piece}:1" for piece in before), "$B:1", *(f"{piece}:1" for piece in after)]
    tokens = [(piece, token_id) for token_id, piece in pieces.items()]
    return processors.TemplateProcessing(single=single, pair=single + pair, special_tokens=tokens)
