"""A batch that does not fit together is refused; padding drops out; expert names survive the round trip."""

import pytest
import torch
from builders import random_run, random_samples, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moe_peft import BatchConfig, ModelInput
from moe_peft.model.batch import ADAPTER_NAME, expert_name, parse_expert_name, segments_of

IDS = torch.arange(6)


def make(ids=IDS, edges=(0, 2, 6), configs=(("", 0, 2),), labels=None):
    return ModelInput(ids, torch.tensor(edges, dtype=torch.int32), [BatchConfig(*config) for config in configs], labels)


def test_what_fits_is_kept():
    batch = make(configs=(("a", 0, 1), ("", 1, 2)), labels=IDS)
    assert batch.boundaries_ == (0, 2, 6)
    assert batch.batch_configs_ == (BatchConfig("a", 0, 1), BatchConfig("", 1, 2))
    assert batch.batch_configs_[0].step == batch.batch_configs_[0].micro_batch == 0


REFUSED = {
    "padded ids": ({"ids": IDS.view(2, 3)}, r"input_ids has shape \(2, 3\) but must be \[T\]; from_padded"),
    "scalar ids": ({"ids": torch.tensor(3)}, r"input_ids has shape \(\)"),
    "starts late": ({"edges": (1, 2, 6)}, r"cu_seqlens=\[1, 2, 6\] must run from 0 to T=6"),
    "ends early": ({"edges": (0, 2, 5)}, "must run from 0 to T=6"),
    "ends late": ({"edges": (0, 2, 7)}, "must run from 0 to T=6"),
    "no sample": ({"edges": (0,)}, "must run from 0 to T=6"),
    "no edge": ({"edges": ()}, "must run from 0 to T=6"),
    "empty sample": ({"edges": (0, 2, 2, 6)}, "sample 1 spans 2:2, but every sample needs a token"),
    "backwards": ({"edges": (0, 4, 2, 6)}, "sample 1 spans 4:2"),
    "nested edges": ({"edges": ((0, 2, 6),)}, r"cu_seqlens has shape \(1, 3\)"),
    "no tokens": ({"ids": IDS[:0], "edges": (0,)}, "must run from 0 to T=0"),
    "labels too short": ({"labels": IDS[:5]}, r"labels has shape \(5,\) but input_ids \(6,\)"),
    "labels padded": ({"labels": IDS[None]}, r"labels has shape \(1, 6\)"),
    "no runs": ({"configs": ()}, "cover 0 samples, but cu_seqlens has 2"),
    "too few": ({"configs": (("a", 0, 1),)}, "cover 1 samples, but cu_seqlens has 2"),
    "too many": ({"configs": (("a", 0, 3),)}, "cover 3 samples, but cu_seqlens has 2"),
    "gap": ({"configs": (("a", 0, 1), ("b", 2, 2))}, "'b' owns samples 2:2, but must start at 1"),
    "overlap": ({"configs": (("a", 0, 2), ("b", 1, 2))}, "'b' owns samples 1:2, but must start at 2"),
    "out of order": ({"configs": (("a", 1, 2), ("b", 0, 1))}, "'a' owns samples 1:2, but must start at 0"),
    "empty run": ({"configs": (("a", 0, 0), ("b", 0, 2))}, "'a' owns samples 0:0"),
    "backward run": ({"configs": (("a", 0, -1),)}, "'a' owns samples 0:-1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_drops_out(side, mask_dtype):
    samples = random_samples((3, 1, 5, 4))
    ids, mask, labels = torch.full((4, 5), 7), torch.zeros(4, 5), torch.full((4, 5), 13)
    for row, sample in enumerate(samples):
        left = side == "left" or (side == "mixed" and row % 2)
        place = slice(5 - len(sample), 5) if left else slice(len(sample))
        ids[row, place] = torch.tensor(sample)
        mask[row, place] = 1
        labels[row, place] = torch.tensor(sample) + 100
    configs = [BatchConfig("a", 0, 3), BatchConfig("", 3, 4)]
    batch = ModelInput.from_padded(ids, mask.to(mask_dtype), labels, configs)
    flat = [token for sample in samples for token in sample]
    assert batch.input_ids.tolist() == flat
    assert batch.labels.tolist() == [token + 100 for token in flat]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 9, 13]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.batch_configs_ == tuple(configs)
    assert ModelInput.from_padded(ids, mask, None, configs).labels is None


PADDED_REFUSED = {
    "flat ids": (IDS, torch.ones(6), None, r"\[B, L\]"),
    "mask of another shape": (IDS.view(2, 3), torch.ones(3, 2), None, r"\[B, L\]"),
    "labels of another shape": (IDS.view(2, 3), torch.ones(2, 3), IDS, r"labels \(6,\) must have the shape"),
    "hole": (IDS.view(2, 3), torch.tensor([[1, 0, 1], [1, 1, 1]]), None, "attention_mask: padding must stand"),
    "no token": (IDS.view(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), None, "sample 1 spans 3:3"),
}


@pytest.mark.parametrize("case", PADDED_REFUSED)
def test_padded_refused(case):
    ids, mask, labels, message = PADDED_REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ModelInput.from_padded(ids, mask, labels, [BatchConfig("", 0, 2)])


names = st.from_regex(ADAPTER_NAME, fullmatch=True)


@given(task=names, index=st.integers(0, 10**6))
def test_expert_names_round_trip(task, index):
    assert parse_expert_name(expert_name(task, index)) == (task, index)
    assert not ADAPTER_NAME.fullmatch(expert_name(task, index)), "no adapter's name may be an expert's"


@given(name=st.from_regex(r"moe\.[\w.-]{0,8}\.experts\.[\d-]{1,4}", fullmatch=True) | st.text() | names)
def test_what_parses_is_spelled_as_it_would_be_built(name):
    """Leading zeros, digits of other scripts and the like name nothing."""
    parsed = parse_expert_name(name)
    assert parsed is None or expert_name(*parsed) == name


@pytest.mark.parametrize("name", ["moe.a.experts.", "moe..experts.0", "moe.a.experts.-1", "moe.a.b.experts.0", "a", ""])
def test_other_names_are_no_experts(name):
    assert parse_expert_name(name) is None


def test_segments_are_tokens_and_know_their_task():
    configs = (BatchConfig("moe.qa.experts.3", 0, 1, step=5, micro_batch=2), BatchConfig("", 1, 2))
    expert, base = segments_of(ModelInput(IDS, torch.tensor([0, 2, 6]), configs))
    assert (expert.task, expert.start, expert.end, expert.step, expert.micro_batch) == ("qa", 0, 2, 5, 2)
    assert (base.task, base.adapter_name, base.start, base.end) == ("", "", 2, 6)


def test_padded_and_flat_batches_give_the_same_logits():
    model = tiny_model()
    samples = random_run("", (5, 2)).samples
    padded = torch.tensor([samples[0], [0, 0, 0, *samples[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    flat = torch.tensor(samples[0] + samples[1])
    configs = [BatchConfig("", 0, 2)]
    (left,) = model(ModelInput.from_padded(padded, mask, None, configs))
    (right,) = model(ModelInput(flat, torch.tensor([0, 5, 7]), tuple(configs)))
    assert torch.equal(left.logits, right.logits)
