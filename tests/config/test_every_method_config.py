"""Every field of every registered method is explained, and refuses what it cannot be."""

import dataclasses
import math
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from moe_peft import strict
from moe_peft.adapters import METHODS
from moe_peft.config import AdapterJob
from moe_peft.config.job import adapter_keys
from moe_peft.train import help_text

FIELDS = [(method, field.name) for method, cls in METHODS.items() for field in dataclasses.fields(cls)]
EVERY_FIELD = pytest.mark.parametrize(("method", "field"), FIELDS)
# Words that mean whatever the user wants.
FREE_TEXT: set[str] = set()
# Numbers that may be negative.
SIGNED = {"scaling", "d_initial"}


def job(method: str, **settings: Any) -> AdapterJob:
    """An adapter's entry as a file has it."""
    return AdapterJob.from_dict({"name": "it", "method": method, "data": "train.jsonl", **settings})


def assert_refused(method: str, field: str, value: object) -> None:
    """By the class and in a file."""
    with pytest.raises(ValueError) as caught:
        METHODS[method](**{field: value})
    message = str(caught.value)
    assert message.startswith(field), message
    assert isinstance(value, dict) or str(value) in message, message
    with pytest.raises(ValueError, match=field):
        job(method, **{field: value})


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_are_an_adapter(method: str) -> None:
    config = METHODS[method]()
    assert config == job(method).adapter
    assert (
        METHODS[method](**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}) == config
    )
    assert job(method, **strict.plain(config)).adapter == config
    with pytest.raises(TypeError):
        METHODS[method](1)
    assert config.peft_type


@EVERY_FIELD
def test_help_explains_each_field(method: str, field: str) -> None:
    meaning = METHODS[method].__dataclass_fields__[field].metadata.get("help")
    assert meaning, f"{field} of {method} has no help"
    text = help_text()
    assert f"\n  {field}: " in text
    assert all(word in text for word in meaning.split())


@pytest.mark.parametrize("method", METHODS)
def test_unknown_keys_are_refused_with_the_nearest(method: str) -> None:
    with pytest.raises(ValueError, match="no_such_key='x' is not a known key"):
        job(method, no_such_key="x")
    for field in strict.field_names(METHODS[method]):
        typo = f"{field}_"
        with pytest.raises(ValueError, match=f"{typo}=1 is not a known key; did you mean {field!r}"):
            job(method, **{typo: 1})
    foreign = set(adapter_keys(None)) - set(adapter_keys(method))
    for key in foreign:
        with pytest.raises(ValueError, match=key):
            job(method, **{key: 1})


def kinds_of(method: str, field: str) -> set[object]:
    """The types that a field takes."""
    hint = get_type_hints(METHODS[method])[field]
    return {get_origin(one) or one for one in (hint, *get_args(hint))} | {hint}


@EVERY_FIELD
def test_a_value_of_the_wrong_type_is_refused(method: str, field: str) -> None:
    kinds = kinds_of(method, field)
    wrong: list[object] = [object(), {"no": object()}, b"x"]
    if bool not in kinds:
        wrong.append(True)
    if not {int, float} & kinds:
        wrong += [7, 1.5]
    if float not in kinds:
        wrong.append(1.5)
    if str not in kinds:
        wrong.append("no such thing")
    if type(None) not in kinds:
        wrong.append(None)
    for value in wrong:
        assert_refused(method, field, value)


@EVERY_FIELD
def test_a_number_out_of_its_range_is_refused(method: str, field: str) -> None:
    kinds = kinds_of(method, field)
    if float in kinds:
        for value in (math.nan, math.inf, -math.inf):
            assert_refused(method, field, value)
    if field not in SIGNED:
        for kind, value in ((int, -1), (int, -(10**9)), (float, -0.5)):
            if kind in kinds:
                assert_refused(method, field, value)


@EVERY_FIELD
def test_a_word_that_is_none_of_its_choices_is_refused(method: str, field: str) -> None:
    if str in kinds_of(method, field) and field not in FREE_TEXT:
        assert_refused(method, field, "no-such-choice")
