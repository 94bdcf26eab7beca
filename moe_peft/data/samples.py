"""From records to samples: token ids, and which of them are learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_peft.data.bundled import bundled_records_path
from moe_peft.data.records import Record, problem_report, read_records
from moe_peft.data.supervision import render_prompt, tokens_and_labels
from moe_peft.data.templates import Template, load_template
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.model.batch import IGNORE_INDEX

__all__ = ["Sample", "SampleSet", "build_samples", "load_samples", "render_prompt"]

OVERLONG = ("error", "skip")


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from.

    Args:
        input_ids: its tokens.
        labels: the same ids where a token is learnt, -100 elsewhere; aligned, not shifted.
        num_truncated: tokens cut from its prompt.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    num_truncated: int = 0

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens that carry a loss: the first one is never predicted, whatever its label."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """The samples of a data set.

    Args:
        samples: in the order of the file.
        records: what each sample was made of.
        num_truncated: samples whose prompt was cut.
        num_skipped: records left out as too long.
        num_tokens: in all samples together.
        num_supervised_tokens: those of them that carry a loss.
    """

    samples: tuple[Sample, ...]
    records: tuple[Record, ...]
    num_truncated: int
    num_skipped: int
    num_tokens: int
    num_supervised_tokens: int


def load_samples(data: str, tokenizer: Tokenizer, *, template: str, cutoff_len: int, overlong: str) -> SampleSet:
    """Reads a data set.

    Args:
        data: a ``.json`` or ``.jsonl`` file, or ``bundled:NAME``.
        tokenizer: of the base model.
        template: a built-in template's name or the user's own file, for records with an instruction.
        cutoff_len: most tokens of a sample.
        overlong: ``error`` or ``skip``: what happens to a record whose answer does not fit.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: on bad records, a bad template, or records that do not fit.
    """
    path = bundled_records_path(data) if data.startswith("bundled:") else Path(data).expanduser()
    return build_samples(read_records(path), tokenizer, load_template(template), cutoff_len, overlong, str(path))


def build_samples(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: Template,
    cutoff_len: int,
    overlong: str = "error",
    source: str = "the data",
) -> SampleSet:
    """Makes a sample of every record.

    A prompt that is too long loses its beginning, but not a leading BOS.

    Args:
        cutoff_len: most tokens of a sample, special tokens included.
        overlong: what to do where cutting the prompt is not enough: ``error``, or ``skip`` and count.
        source: the file, for messages.

    Raises:
        ValueError: naming file and line of every record that does not fit, or that the chat template cannot render in
            a way that tells its answers apart; when nothing is left; or when the tokenizer lacks what is needed.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong={overlong!r} must be one of {', '.join(OVERLONG)}")
    if cutoff_len < 2:
        raise ValueError(f"cutoff_len={cutoff_len} must be at least 2: a token to learn, and one to learn it from")
    samples: list[Sample] = []
    kept: list[Record] = []
    too_long: list[tuple[int, str]] = []
    problems: list[tuple[int, str]] = []
    for record in records:
        try:
            ids, labels = tokens_and_labels(record, tokenizer, template)
            if all(label == IGNORE_INDEX for label in labels[1:]):
                raise ValueError("there is no token to learn, with one before it to learn it from")
        except ValueError as error:
            problems.append((record.line, str(error)))
            continue
        sample = _fit(ids, labels, cutoff_len, tokenizer.bos_token_id)
        if sample is None:
            answer = len(ids) - _first_supervised(labels)
            too_long.append((record.line, f"{len(ids)} tokens, {answer} of them from the beginning of the answer on"))
        else:
            samples.append(sample)
            kept.append(record)
    if problems:
        raise problem_report(source, "unusable records", problems, len(records))
    if too_long and overlong == "error":
        what = f"records too long for cutoff_len={cutoff_len} (raise it, or leave them out with overlong: skip)"
        raise problem_report(source, what, too_long, len(records))
    if not samples:
        why = f"all {len(records)} records are too long for cutoff_len={cutoff_len}" if records else "it has no records"
        raise ValueError(f"nothing is left to learn from {source}: {why}")
    return SampleSet(
        samples=tuple(samples),
        records=tuple(kept),
        num_truncated=sum(sample.num_truncated > 0 for sample in samples),
        num_skipped=len(too_long),
        num_tokens=sum(len(sample.input_ids) for sample in samples),
        num_supervised_tokens=sum(sample.num_supervised_tokens for sample in samples),
    )


def _fit(ids: list[int], labels: list[int], cutoff_len: int, bos_id: int | None) -> Sample | None:
    """Cuts a prompt from the left; None where that would cut what is learnt, or all that it is learnt from."""
    excess = max(0, len(ids) - cutoff_len)
    if excess and excess > _first_supervised(labels) - 1:
        return None
    kept = int(ids[0] == bos_id)
    return Sample(
        tuple(ids[:kept] + ids[kept + excess :]),
        tuple(labels[:kept] + labels[kept + excess :]),
        excess,
    )


def _first_supervised(labels: Sequence[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
