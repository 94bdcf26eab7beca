"""Serializes a sentencepiece model from the pieces of its vocabulary."""

import struct
from collections.abc import Sequence

_BPE = 2
_BYTE = 6
# A field's number and its wire type, as protocol buffers write them: 0 a varint, 2 a message or string, 5 a float.
_VARINT, _LENGTH, _FLOAT = 0, 2, 5


def sentencepiece_bpe_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
) -> bytes:
    """Returns a BPE model that the sentencepiece library loads.

    The field numbers are those of sentencepiece_model.proto,
    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.

    Args:
        pieces: by id.
        scores: of every piece; the higher, the earlier it is merged.
        types: of every piece: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
        add_dummy_prefix: put a space before a text.
        remove_extra_whitespaces: make one space of several.
    """
    model = b"".join(
        _field(1, _LENGTH, _field(1, _LENGTH, piece.encode()) + _field(2, _FLOAT, score) + _field(3, _VARINT, type_))
        for piece, score, type_ in zip(pieces, scores, types, strict=True)
    )
    model += _field(2, _LENGTH, _field(3, _VARINT, _BPE) + _field(35, _VARINT, int(_BYTE in types)))
    return model + _field(3, _LENGTH, _white_space_fields(add_dummy_prefix, remove_extra_whitespaces))


def with_plain_white_space(model: bytes) -> bytes:
    """Returns ``model`` without a dummy prefix, and without removal of white space."""
    # Protocol buffers merge a message that stands twice, so what is appended overrides.
    return model + _field(3, _LENGTH, _white_space_fields(False, False))


def _white_space_fields(add_dummy_prefix: bool, remove_extra_whitespaces: bool) -> bytes:
    """The two settings of a model's normalizer that concern white space."""
    return _field(3, _VARINT, int(add_dummy_prefix)) + _field(4, _VARINT, int(remove_extra_whitespaces))


def _field(number: int, wire_type: int, value: bytes | float) -> bytes:
    key = _varint(number << 3 | wire_type)
    if isinstance(value, bytes):
        return key + _varint(len(value)) + value
    return key + (struct.pack("<f", value) if wire_type == _FLOAT else _varint(int(value)))


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
