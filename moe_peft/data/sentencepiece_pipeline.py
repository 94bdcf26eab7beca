"""A sentencepiece BPE model as a pipeline of the ``tokenizers`` library.

The conversion is that of transformers' LlamaConverter (``convert_slow_tokenizer.py``): sentencepiece merges the pair
whose piece scores highest, the library the pair that stands first in its list.
"""

from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers

_SPACE = "▁"


def bpe_pipeline(processor: Any) -> tokenizers.Tokenizer:
    """The pipeline of a processor, without special tokens."""
    num_pieces = processor.get_piece_size()
    vocab = {processor.id_to_piece(i): i for i in range(num_pieces)}
    mergeable = {
        piece: i
        for piece, i in vocab.items()
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i))
    }
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, i in mergeable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                merges.append((-processor.get_score(i), mergeable[left], mergeable[right], (left, right)))
    merges.sort()
    unknown = processor.id_to_piece(processor.unk_id())
    model = models.BPE(
        vocab=vocab,
        merges=[pair for *_, pair in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=any(processor.is_byte(i) for i in range(num_pieces)),
    )
    pipeline = tokenizers.Tokenizer(model)
    adds_space = processor.encode("a", out_type=str)[0].startswith(_SPACE)
    keeps_spaces = processor.encode("  ", out_type=str) != []
    steps: list[Any] = [] if keeps_spaces else [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if adds_space else []
    pipeline.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    pipeline.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if adds_space else parts)
    return pipeline
