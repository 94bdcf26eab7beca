"""Fixtures of the data room."""

import pytest

from moe_peft.io.source import resolve_source


@pytest.fixture(scope="session")
def smollm2_file():
    """The built-in base model's file, fetched once and cached."""
    return resolve_source("smollm2-135m")
