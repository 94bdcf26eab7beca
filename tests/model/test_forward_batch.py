"""A narrowed batch draws the masks that its tokens have in the whole one."""

import pytest
import torch

from moe_peft.model.batch import Segment
from moe_peft.model.forward import ForwardBatch

SEGMENTS = (Segment("a", "a", 0, 7, 3, 1), Segment("a", "a", 7, 9, 3, 2), Segment("b", "b", 9, 15, 0, 0))
BOUNDARIES = (0, 4, 7, 9, 10, 15)
FIRSTS = (2, 0, 1, 0, 4)
KEPT = [2, 3, 4, 5, 6, 8, 9, 14]
X = torch.zeros(15, 6)


def make(*, training=True):
    table = torch.zeros(15, 1, 2)
    return ForwardBatch(SEGMENTS, BOUNDARIES, table, table, training)


def masks(batch, *, p=0.5, layer_idx=1, x=X):
    """The masks of all segments, one below the other."""
    found = [batch.dropout_mask(segment, 9, p, layer_idx, "attn_in", x) for segment in batch.segments]
    return torch.cat(found)


@pytest.mark.parametrize("steps", [[FIRSTS], [(1, 0, 1, 0, 2), (1, 0, 0, 0, 2)]], ids=["once", "twice"])
@pytest.mark.parametrize("first", ["the whole", "the narrowed"])
def test_a_tokens_mask_does_not_depend_on_which_others_are_there(first, steps):
    whole = make()
    expected = masks(make())[KEPT]
    narrow = whole
    for step in steps:
        narrow = narrow.narrowed(step)
    if first == "the whole":
        masks(whole)
    assert torch.equal(masks(narrow), expected)
    assert torch.equal(masks(whole)[KEPT], expected)
    assert 0 < expected.count_nonzero() < expected.numel()


def test_masks_of_the_narrowed_batch_follow_the_layer():
    narrow = make().narrowed(FIRSTS)
    layers = [masks(narrow, layer_idx=layer_idx) for layer_idx in (0, 1, 0)]
    assert torch.equal(layers[0], layers[2])
    assert not torch.equal(layers[0], layers[1])


def test_the_masks_dtype_is_its_inputs():
    narrow = make().narrowed(FIRSTS)
    assert masks(narrow, x=X.bfloat16()).dtype == torch.bfloat16


def test_nothing_is_drawn_where_nothing_is_dropped():
    for batch in (make(training=False), make(training=False).narrowed(FIRSTS)):
        assert batch.dropout_mask(batch.segments[0], 9, 0.5, 1, "attn_in", X) is None
    for batch in (make(), make().narrowed(FIRSTS)):
        assert batch.dropout_mask(batch.segments[0], 9, 0.0, 1, "attn_in", X) is None


def test_nothing_dropped_is_the_batch_itself():
    batch = make()
    assert batch.narrowed((0,) * 5) is batch
    narrow = batch.narrowed(FIRSTS)
    assert narrow.narrowed((0,) * 5) is narrow


def test_only_the_current_layers_masks_are_kept():
    """Backward keeps what it needs; the batch must not keep every layer's masks beside it."""
    batch = make()
    for layer_idx in range(4):
        masks(batch.narrowed(FIRSTS), layer_idx=layer_idx)
        masks(batch, layer_idx=layer_idx)
    assert {layer for layer, _, _ in batch._masks} == {3}
