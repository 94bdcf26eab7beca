"""A tokenizer from a sentencepiece model, such as the ``tokenizer.model`` of LLaMA and Mistral."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from moe_peft.data.sentencepiece_model import with_plain_white_space
from moe_peft.data.tokenizer_parts import TokenizerParts, ids_around
from moe_peft.data.tokenizer_settings import TokenizerSettings, read_tokenizer_settings


def read_sentencepiece_tokenizer(path: Path) -> TokenizerParts:
    """Reads a sentencepiece model and the Hugging Face settings that may stand beside it.

    The behaviour is that of transformers' slow LlamaTokenizer: a first token unless ``add_bos_token`` is false, and
    sentencepiece's own dummy space before every stretch of text between special tokens, or only before the first one
    with ``legacy: false``.

    Raises:
        ValueError: naming the file that cannot be understood.
    """
    settings = read_tokenizer_settings(path.parent)
    processor = load_processor(path.read_bytes(), str(path), plain_white_space=settings.legacy is False)
    added = _added_tokens(processor, settings)
    special_tokens = {
        name: processor.id_to_piece(token_id)
        for name, token_id in (
            ("bos_token", processor.bos_id()),
            ("eos_token", processor.eos_id()),
            ("unk_token", processor.unk_id()),
        )
        if token_id >= 0 and name not in settings.named_tokens
    }
    special_tokens |= {name: token.content for name, token in settings.named_tokens.items() if token is not None}
    ids = {token.content: token_id for token_id, token in added.items()}
    bos_id, eos_id = (ids.get(special_tokens.get(name, "")) for name in ("bos_token", "eos_token"))
    backend = SentencePieceBackend(
        processor,
        added,
        prefix=() if bos_id is None or settings.add_bos_token is False else (bos_id,),
        suffix=() if eos_id is None or not settings.add_eos_token else (eos_id,),
        first_segment_only=settings.legacy is False,
        add_prefix_space=settings.add_prefix_space is not False,
        split_special_tokens=settings.split_special_tokens,
    )
    return TokenizerParts(
        backend=backend,
        special_tokens=special_tokens,
        eos_token_ids=settings.end_token_ids(eos_id),
        chat_template=settings.chat_template,
        origin=str(path),
    )


def load_processor(model: bytes, origin: str, *, plain_white_space: bool = False) -> Any:
    """Returns the sentencepiece library's processor of a serialized model.

    Args:
        plain_white_space: add no dummy space in front, remove no white space.

    Raises:
        ValueError: when ``model``, read from ``origin``, is no sentencepiece model.
    """
    from sentencepiece import SentencePieceProcessor

    if not model:  # which the library would take for a processor without a model
        raise ValueError(f"{origin} is not a sentencepiece model: it is empty")
    try:
        return SentencePieceProcessor(model_proto=with_plain_white_space(model) if plain_white_space else model)
    except RuntimeError as error:
        raise ValueError(f"{origin} is not a sentencepiece model: {error}") from error


def _added_tokens(processor: Any, settings: TokenizerSettings) -> dict[int, AddedToken]:
    """Tokens matched whole in a text, by id: what sentencepiece itself never makes of text, and what the files add."""
    num_pieces = processor.get_piece_size()
    tokens = {
        i: AddedToken(processor.id_to_piece(i), special=True)
        for i in range(num_pieces)
        if processor.is_control(i) or processor.is_unknown(i)
    }
    tokens |= settings.added_tokens
    known = {token.content: token_id for token_id, token in tokens.items()}
    for token in (*settings.named_tokens.values(), *settings.extra_special_tokens):
        if token is None or token.content in known:
            continue
        token_id = processor.piece_to_id(token.content)
        if processor.id_to_piece(token_id) != token.content:  # unknown to the vocabulary: it goes behind the last
            token_id = max([num_pieces - 1, *tokens]) + 1
        tokens[token_id] = token
        known[token.content] = token_id
    return tokens


class SentencePieceBackend:
    """The ``sentencepiece`` library, with special tokens matched in the text.

    Args:
        processor: sentencepiece's own; adds the dummy space itself unless ``first_segment_only``.
        added: tokens matched whole, by id.
        prefix: ids put before a text.
        suffix: ids put after it.
        first_segment_only: only the beginning of the text gets a space in front; ``processor`` must add none then.
        add_prefix_space: whether it gets one; only looked at with ``first_segment_only``.
        split_special_tokens: read the text of a special token as plain text.
    """

    def __init__(
        self,
        processor: Any,
        added: Mapping[int, AddedToken],
        *,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        first_segment_only: bool = False,
        add_prefix_space: bool = True,
        split_special_tokens: bool = False,
    ) -> None:
        self._processor = processor
        self._added = dict(sorted(added.items()))
        self._prefix, self._suffix = list(prefix), list(suffix)
        matched = [i for i, token in self._added.items() if not (token.special and split_special_tokens)]
        self._matched = sorted(matched, key=lambda token_id: -len(self._added[token_id].content))
        self._leading_space = " " if first_segment_only and add_prefix_space else ""
        self.vocab_size: int = max([processor.get_piece_size() - 1, *self._added]) + 1
        self.special_ids = {token.content: i for i, token in self._added.items() if token.special}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        position = 0
        for match in self._pattern.finditer(text):
            ids += self._encode_segment(text[position : match.start()], first=position == 0)
            assert match.lastindex is not None
            ids.append(self._matched[match.lastindex - 1])
            position = match.end()
        ids += self._encode_segment(text[position:], first=position == 0)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def _encode_segment(self, text: str, first: bool) -> list[int]:
        if not text:
            return []
        ids: list[int] = self._processor.encode(self._leading_space + text if first else text, out_type=int)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        texts: list[str] = []
        segment: list[int] = []
        for token_id in ids:
            token = self._added.get(token_id)
            if token is not None:
                if token.special and skip_special_tokens:
                    continue
                texts += [self._decode_segment(segment, first=not texts), token.content]
                segment = []
            elif 0 <= token_id < self._processor.get_piece_size():
                segment.append(token_id)
        texts.append(self._decode_segment(segment, first=not texts))
        return "".join(texts)

    def _decode_segment(self, ids: list[int], first: bool) -> str:
        text: str = self._processor.decode(ids) if ids else ""
        return text.removeprefix(self._leading_space) if first else text

    def token_to_id(self, token: str) -> int | None:
        for token_id, added in self._added.items():
            if added.content == token:
                return token_id
        token_id = self._processor.piece_to_id(token)
        return token_id if self._processor.id_to_piece(token_id) == token else None

    def to_tokenizers(self) -> "tokenizers.Tokenizer":
        from moe_peft.data.sentencepiece_pipeline import bpe_pipeline

        pipeline = bpe_pipeline(self._processor)
        for token in self._added.values():
            pipeline.add_tokens([token])
        if self._prefix or self._suffix:
            pipeline.post_processor = ids_around(pipeline, self._prefix, self._suffix)
        return pipeline

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """One group a token, the longest first, with the white space that a token swallows on its sides."""
        groups = []
        for token_id in self._matched:
            token = self._added[token_id]
            left, right = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
            groups.append(f"({left}{re.escape(token.content)}{right})")
        return re.compile("|".join(groups) or "(?!)")
