"""A list with gaps comes back as it was."""

import pytest
import torch

from moe_peft.kernels.optional_tensors import with_gaps, without_gaps


@pytest.mark.parametrize("present", [(), (True,), (False,), (False, True, False, True, True), (False, False)])
def test_there_and_back(present):
    items = [torch.full((2,), float(i)) if here else None for i, here in enumerate(present)]
    tensors, flags = without_gaps(iter(items))
    assert flags == list(present)
    assert len(tensors) == sum(present)
    again = with_gaps(tensors, flags)
    assert len(again) == len(items)
    assert all(actual is item for actual, item in zip(again, items, strict=True))
