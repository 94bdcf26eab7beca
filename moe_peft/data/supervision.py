"""Which tokens of a record are learnt, and which stand before an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_peft.data.records import ChatRecord, InstructionRecord, Record, TextRecord
from moe_peft.data.templates import Template
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.model.batch import IGNORE_INDEX

# A stretch of text, and whether it is learnt.
Piece = tuple[str, bool]


def tokens_and_labels(record: Record, tokenizer: Tokenizer, template: Template) -> tuple[list[int], list[int]]:
    """Returns the ids of a record, and its labels: the same ids where a token is learnt, -100 elsewhere.

    Learnt are the answer and its end token, every assistant turn of a conversation, and all of a ``text``.

    Args:
        template: for a record with an instruction; a conversation goes through the tokenizer's chat template.

    Raises:
        ValueError: when the tokenizer lacks an end token or a chat template, or when the chat template fails or does
            not tell the answers apart.
    """
    if isinstance(record, ChatRecord):
        return encode_pieces(tokenizer, _chat_pieces(record.messages, tokenizer))
    if isinstance(record, InstructionRecord) and template.is_chat:
        messages = [_user_turn(record, template), {"role": "assistant", "content": record.output}]
        return encode_pieces(tokenizer, _chat_pieces(messages, tokenizer))
    if isinstance(record, InstructionRecord):
        pieces = [(template.prompt(record.instruction, record.input), False), (record.output, True)]
    else:
        pieces = [(record.text, True)]
    ids, labels = encode_pieces(tokenizer, pieces)
    prefix = list(tokenizer.prefix_ids)
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise ValueError("the tokenizer has no end token (eos_token), so no answer would ever end")
    end = [] if ids[-1:] == [eos_id] else [eos_id]
    return prefix + ids + end, [IGNORE_INDEX] * len(prefix) + labels + end


def _user_turn(record: InstructionRecord, template: Template) -> dict[str, str]:
    return {"role": "user", "content": template.prompt(record.instruction, record.input)}


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
    """Returns the ids of all pieces as one text, and their labels.

    A piece ends where the ids of the text up to there, encoded alone, stop being those of the whole: so what is a
    prompt here has the ids that it has when an answer to it is generated. A token that spans two pieces belongs to the
    second.

    Args:
        tokenizer: adds no special tokens here.
        pieces: stretches of text, and whether they are learnt.
    """
    text = "".join(piece for piece, _ in pieces)
    ids = tokenizer.encode(text, add_special_tokens=False)
    labels: list[int] = []
    prefix = ""
    for piece, supervised in pieces:
        prefix += piece
        end = len(ids)
        if len(prefix) < len(text):
            end = max(len(labels), _common_prefix(tokenizer.encode(prefix, add_special_tokens=False), ids))
        labels += ids[len(labels) : end] if supervised else [IGNORE_INDEX] * (end - len(labels))
    return ids, labels


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _chat_pieces(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[Piece]:
    """Cuts a rendered conversation at the beginning and the end of every assistant turn."""
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    pieces: list[Piece] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, tokenize=False)
        turn = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        # What a model is asked for when it is used must be what it has seen: the conversation so far, rendered as a
        # prompt, has to be the beginning of the conversation with its answer, and that of the whole one.
        if not (turn.startswith(prompt) and full.startswith(turn) and len(prompt) >= position):
            raise ValueError(
                f"the chat template is not prefix-stable at messages[{index}]: what comes before this answer, rendered "
                "as a prompt, is not the beginning of the whole conversation as rendered"
            )
        end = len(prompt) + _answer_end(turn[len(prompt) :], message["content"], tokenizer)
        pieces += [(full[position : len(prompt)], False), (full[len(prompt) : end], True)]
        position = end
    return [*pieces, (full[position:], False)]


def _answer_end(turn: str, content: str, tokenizer: Tokenizer) -> int:
    """Where an assistant turn's end token ends; what a template writes after that (a newline) is not the model's."""
    answer = content.strip()  # templates trim
    start = turn.find(answer)
    after = 0 if start < 0 else start + len(answer)
    ends = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in tokenizer.eos_token_ids]
    for candidates in (ends, tokenizer.special_ids):
        found = [(turn.find(text, after), -len(text)) for text in candidates if text and text in turn[after:]]
        if found:
            position, negative_length = min(found)
            return position - negative_length
    return len(turn)  # a template without end tokens: all that it writes tells that the turn is over


def render_prompt(
    record_or_messages: Record | Sequence[Mapping[str, Any]], tokenizer: Tokenizer, template: Template
) -> list[int]:
    """Returns the ids to generate an answer from: those that stand before the answer in training.

    Args:
        record_or_messages: a record, of whose conversation the last answer is asked for, or the turns of a
            conversation so far.
        tokenizer: of the base model.
        template: for a record with an instruction.

    Raises:
        ValueError: for a ``text`` record, which has no prompt, or when the chat template fails.
    """
    if isinstance(record_or_messages, TextRecord):
        raise ValueError("a text record has no prompt: all of it is learnt")
    if isinstance(record_or_messages, InstructionRecord) and not template.is_chat:
        prompt = template.prompt(record_or_messages.instruction, record_or_messages.input)
        return [*tokenizer.prefix_ids, *tokenizer.encode(prompt, add_special_tokens=False)]
    if isinstance(record_or_messages, InstructionRecord):
        messages: Sequence[Mapping[str, Any]] = [_user_turn(record_or_messages, template)]
    elif isinstance(record_or_messages, ChatRecord):
        messages = record_or_messages.messages
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        messages = messages[:last]
    else:
        messages = record_or_messages
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)
