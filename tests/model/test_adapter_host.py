"""What a model refuses to attach, merge or remove: each by its rule, and nothing has changed."""

import re

import pytest
from builders import add_random_adapter, tiny_model

from moe_peft import LoraConfig
from moe_peft.adapters import METHODS

VIRTUAL = ("prompt_tuning", "p_tuning", "prefix_tuning")


@pytest.mark.parametrize(
    ("seed", "rule"),
    [
        ("x", "int, not str"),
        (None, "int, not null"),
        (1.5, "int, not float"),
        (float("nan"), "int, not float"),
        (True, "int, not bool"),
        (-1, "in 0..2**63-1"),
        (2**63, "in 0..2**63-1"),
        (2**70, "in 0..2**63-1"),
    ],
)
def test_bad_seeds(seed, rule):
    model = tiny_model()
    with pytest.raises(ValueError, match=re.escape(f"seed={seed!r} must be {rule}")):
        model.add_adapter("qa", LoraConfig(), seed=seed)
    assert model.adapter_names == []
    model.add_adapter("qa", LoraConfig(), seed=2**63 - 1)


@pytest.mark.parametrize("name", [None, 5, ["a"], b"a"])
def test_what_is_no_name(name):
    model = tiny_model()
    add_random_adapter(model, "a", LoraConfig(r=2))
    with pytest.raises(ValueError, match=re.escape(f"adapter name {name!r} must consist of letters")):
        model.add_adapter(name, LoraConfig())
    for action in (model.merge_adapter, model.remove_adapter, model.unmerge_adapter, model.adapter_config):
        with pytest.raises(
            ValueError, match=re.escape(f"adapter {name!r} is not attached to this model; valid here: a")
        ):
            action(name)
    assert model.adapter_names == ["a"]


@pytest.mark.parametrize("method", VIRTUAL)
@pytest.mark.parametrize("number", [63, 60_000])
def test_more_virtual_tokens_than_the_base_is_made_for(method, number):
    model = tiny_model()  # of 64 tokens
    rule = f"num_virtual_tokens={number} must be at most 62 on this base model, which is made for 64 tokens"
    with pytest.raises(ValueError, match=rule):
        model.add_adapter("qa", METHODS[method](num_virtual_tokens=number))
    assert model.adapter_names == []
    model.add_adapter("qa", METHODS[method](num_virtual_tokens=62))
