"""Targets and narrowed batches equal a naive walk over the tokens."""

import itertools
import re
from dataclasses import dataclass

import pytest
import torch
from builders import IGNORE
from hypothesis import given
from hypothesis import strategies as st

from moe_peft import BatchConfig, ModelInput
from moe_peft.model.batch import segments_of
from moe_peft.model.forward import ForwardBatch
from moe_peft.model.targets import Targets

VOCAB = 11


def model_input(samples, owners=None, dtype=torch.long):
    """A batch of these samples' labels; ``owners`` says how many samples each batch config has."""
    labels = [label for sample in samples for label in sample]
    configs, first = [], 0
    for i, number in enumerate(owners or [len(samples)]):
        configs.append(BatchConfig(f"a{i}", first, first + number))
        first += number
    edges = torch.tensor([0, *itertools.accumulate(len(sample) for sample in samples)], dtype=torch.int32)
    return ModelInput(
        torch.zeros(len(labels), dtype=torch.long), edges, tuple(configs), torch.tensor(labels, dtype=dtype)
    )


def forward_batch(of):
    """As the model makes it; every token's cos is its position."""
    positions = torch.arange(len(of.input_ids), dtype=torch.float64)[:, None, None]
    return ForwardBatch(segments_of(of), of.boundaries_, positions, -positions, training=False)


@dataclass
class Naive:
    """The supervised positions, one at a time."""

    rows: list
    ids: list
    firsts: list

    @classmethod
    def of(cls, samples):
        rows, ids, firsts, start = [], [], [], 0
        for sample in samples:
            first = len(sample) - 1
            for position in reversed(range(len(sample) - 1)):
                if sample[position + 1] != IGNORE:
                    first = position
            for position in range(len(sample) - 1):
                if sample[position + 1] != IGNORE:
                    rows.append(start + position)
                    ids.append(sample[position + 1])
            firsts.append(first)
            start += len(sample)
        return cls(rows, ids, firsts)


label = st.one_of(st.just(IGNORE), st.integers(0, VOCAB - 1))
samples_of_labels = st.lists(st.lists(label, min_size=1, max_size=7), min_size=1, max_size=6)


@st.composite
def owned(draw):
    """Samples' labels and how many samples each batch config owns."""
    samples = draw(samples_of_labels)
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(samples) - 1)), max_size=3))) if len(samples) > 1 else []
    edges = [0, *cuts, len(samples)]
    return samples, [end - start for start, end in itertools.pairwise(edges)]


@given(samples_of_labels, st.sampled_from([torch.int32, torch.int64]))
def test_targets_equal_the_naive_walk(samples, dtype):
    targets = Targets.of(model_input(samples, dtype=dtype), VOCAB)
    naive = Naive.of(samples)
    assert targets.rows.tolist() == naive.rows
    assert targets.ids.tolist() == naive.ids
    assert list(targets.firsts) == naive.firsts
    assert targets.rows.dtype == targets.ids.dtype == torch.long


@given(owned())
def test_bounds_count_the_positions_before_each_edge(case):
    samples, owners = case
    of = model_input(samples, owners)
    targets = Targets.of(of, VOCAB)
    naive = Naive.of(samples)
    segments = segments_of(of)
    edges = [segment.start for segment in segments] + [segments[-1].end]
    assert targets.bounds(edges) == [sum(row < edge for row in naive.rows) for edge in edges]


@given(owned(), st.data())
def test_rows_survive_one_narrowing_and_two(case, data):
    """Drop any tokens before a sample's first target, in one step and then another."""
    samples, owners = case
    of = model_input(samples, owners)
    targets, naive = Targets.of(of, VOCAB), Naive.of(samples)
    batch = forward_batch(of)
    once = [data.draw(st.integers(0, first)) for first in naive.firsts]
    twice = [data.draw(st.integers(0, first - dropped)) for first, dropped in zip(naive.firsts, once, strict=True)]
    for steps in ([once], [once, twice], [twice], [naive.firsts]):
        narrow, dropped = batch, [0] * len(samples)
        for step in steps:
            narrow = narrow.narrowed(step)
            dropped = [before + now for before, now in zip(dropped, step, strict=True)]
        kept = [
            start + position
            for start, sample, first in zip(of.boundaries_, samples, dropped, strict=False)
            for position in range(first, len(sample))
        ]
        assert [kept[row] for row in targets.rows_within(narrow).tolist()] == naive.rows
        check_narrowed(narrow, batch, samples, owners, dropped, kept)


def check_narrowed(narrow, batch, samples, owners, dropped, kept):
    """Boundaries, segments and rotary tables of the batch that is left."""
    lengths = [len(sample) - first for sample, first in zip(samples, dropped, strict=True)]
    edges = [0, *itertools.accumulate(lengths)]
    assert list(narrow.boundaries) == edges
    owned_edges = [edges[i] for i in (0, *itertools.accumulate(owners))]
    assert [(part.start, part.end) for part in narrow.segments] == list(itertools.pairwise(owned_edges))
    assert narrow.cos.flatten().tolist() == kept
    assert torch.equal(narrow.sin, -narrow.cos)
    assert [part.adapter_name for part in narrow.segments] == [part.adapter_name for part in batch.segments]


@given(owned(), st.data())
def test_a_segments_rows_within_the_whole(case, data):
    samples, owners = case
    of = model_input(samples, owners)
    batch = forward_batch(of)
    firsts = [data.draw(st.integers(0, len(sample) - 1)) for sample in samples]
    narrow = batch.narrowed(firsts)
    if not any(firsts):
        assert narrow is batch
        assert all(narrow.rows_within(segment) is None for segment in narrow.segments)
        return
    assert narrow.cu_seqlens is None
    sample_edges = [0, *itertools.accumulate(owners)]
    for segment, (first, last) in zip(narrow.segments, itertools.pairwise(sample_edges), strict=True):
        expected, start = [], 0
        for sample, dropped in zip(samples[first:last], firsts[first:last], strict=True):
            expected += range(start + dropped, start + len(sample))
            start += len(sample)
        assert narrow.rows_within(segment).tolist() == expected


def test_no_labels_no_targets():
    of = ModelInput(torch.zeros(3, dtype=torch.long), torch.tensor([0, 3]), (BatchConfig("", 0, 1),))
    assert Targets.of(of, VOCAB) is None


def test_a_label_predicts_nothing_across_samples():
    """The first label of a sample has no token before it; the last token of a sample predicts nothing."""
    targets = Targets.of(model_input([[1, IGNORE, 3], [4], [5, 6], [IGNORE, IGNORE]]), VOCAB)
    assert targets.rows.tolist() == [1, 4]
    assert targets.ids.tolist() == [3, 6]
    assert targets.firsts == (1, 0, 0, 1)


@pytest.mark.parametrize("label", [VOCAB, -1, -99, 2**31 - 1])
@pytest.mark.parametrize("place", [1, 2])
def test_a_label_outside_the_vocabulary_is_refused(label, place):
    labels = [0, 1, 2]
    labels[place] = label
    with pytest.raises(ValueError, match=re.escape("labels must be -100 or in 0..vocab_size-1=10")):
        Targets.of(model_input([labels, [1]]), VOCAB)


def test_the_vocabularys_ends_are_inside():
    targets = Targets.of(model_input([[0, 0, VOCAB - 1]]), VOCAB)
    assert targets.ids.tolist() == [0, VOCAB - 1]


def test_the_labels_are_left_alone():
    of = model_input([[1, 2, 3], [4, 5]])
    before = of.labels.clone()
    Targets.of(of, VOCAB)
    assert torch.equal(of.labels, before)
