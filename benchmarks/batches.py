"""The samples that a benchmark trains on: of one length, or drawn from real records.

Letters: B samples a step.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_peft.data.bundled import bundled_names, bundled_records_path
from moe_peft.data.records import read_records
from moe_peft.data.samples import Sample, build_samples
from moe_peft.data.templates import load_template
from moe_peft.data.tokenizer import load_tokenizer
from moe_peft.model.batch import IGNORE_INDEX

TOKENIZER = "smollm2-135m"  # of real records, whatever the model: random weights come without one


@dataclass(frozen=True)
class Batch:
    """The samples of one step.

    Args:
        samples: B of them.
    """

    samples: tuple[Sample, ...]

    @property
    def num_tokens(self) -> int:
        """Of all samples together."""
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def num_supervised(self) -> int:
        """Tokens that carry a loss: none of them is the first of its sample."""
        return sum(sample.num_supervised_tokens for sample in self.samples)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(sample.input_ids) for sample in self.samples]


def uniform_batches(
    num_tokens: int, num_samples: int, vocab_size: int, *, supervised: float = 1.0, count: int = 2, seed: int = 0
) -> list[Batch]:
    """Random tokens in samples of one length.

    Args:
        num_tokens: of a step.
        num_samples: B; divides ``num_tokens``.
        vocab_size: the tokens are below it.
        supervised: share of each sample that carries a loss: its end, where an answer stands.
        count: batches.
        seed: of the tokens.

    Raises:
        ValueError: when the samples cannot be of one length, or the share is none.
    """
    if num_samples < 1 or num_tokens % num_samples or num_tokens < 2 * num_samples:
        raise ValueError(f"tokens={num_tokens} must be a multiple of samples={num_samples}, and two a sample at least")
    if not 0.0 < supervised <= 1.0:
        raise ValueError(f"supervised={supervised} must be above 0 and at most 1")
    length = num_tokens // num_samples
    prompt = min(length - 1, round(length * (1.0 - supervised)))
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(vocab_size, (num_samples, length), generator=generator).tolist()
        batches.append(Batch(tuple(Sample(tuple(row), (IGNORE_INDEX,) * prompt + tuple(row[prompt:])) for row in ids)))
    return batches


def real_batches(
    files: Sequence[str],
    num_samples: int,
    vocab_size: int,
    *,
    count: int,
    template: str = "alpaca",
    cutoff_len: int = 512,
    seed: int = 0,
) -> list[Batch]:
    """Records drawn from files, answers supervised; a batch is of one file, as one task's training is.

    Args:
        files: of records, or ``bundled:NAME``; their batches take turns. Empty: the bundled tasks.
        num_samples: B.
        vocab_size: of the model; tokens beyond it are folded into it.
        count: batches.
        template: for records with an instruction.
        cutoff_len: longest sample.
        seed: of the draw.

    Raises:
        ValueError: when a file has too few records, or bad ones.
    """
    tokenizer = load_tokenizer(TOKENIZER)
    sources = list(files) or [f"bundled:{name}" for name in bundled_names()]
    pools: list[list[Sample]] = []
    for number, source in enumerate(sources):
        wanted = num_samples * len(range(number, count, len(sources)))
        path = bundled_records_path(source) if source.startswith("bundled:") else Path(source)
        records = read_records(path)
        if len(records) < wanted:
            raise ValueError(
                f"{source} holds {len(records)} records, but {wanted} are needed: ask for fewer steps or samples"
            )
        drawn = random.Random(seed).sample(records, wanted)
        built = build_samples(drawn, tokenizer, load_template(template), cutoff_len, "error", source) if drawn else None
        pools.append([_folded(sample, vocab_size) for sample in built.samples] if built else [])
    return [Batch(tuple(pools[number % len(pools)].pop() for _ in range(num_samples))) for number in range(count)]


def _folded(sample: Sample, vocab_size: int) -> Sample:
    ids = tuple(token % vocab_size for token in sample.input_ids)
    labels = tuple(label if label == IGNORE_INDEX else label % vocab_size for label in sample.labels)
    return Sample(ids, labels)


def describe_files(files: Sequence[str]) -> list[str]:
    """The files as a row names them: without the folders that only this machine has."""
    sources = list(files) or [f"bundled:{name}" for name in bundled_names()]
    return [source if source.startswith("bundled:") else "/".join(Path(source).parts[-2:]) for source in sources]
