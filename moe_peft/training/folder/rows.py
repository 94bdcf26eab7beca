"""The rows of a ``metrics.jsonl`` as the dataclasses they were written from."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from moe_peft.training.folder.metrics import EVENTS, Row

_TYPES: dict[str, type] = {event: row_type for row_type, event in EVENTS.items()}


def typed_rows(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows whose event and fields this version knows; null is the NaN or the infinity that JSON does not have.

    Args:
        rows: as ``read_metrics`` gives them.

    Raises:
        ValueError: on a row without a field that its event cannot do without.
    """
    return [_typed(row, _TYPES[row["event"]]) for row in rows if row["event"] in _TYPES]


def _typed(row: Mapping[str, Any], row_type: type) -> Any:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(row_type):
        if field.name in row:
            value = row[field.name]
            values[field.name] = math.nan if value is None else value
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"a row of the event {row['event']!r} has no {field.name}: {dict(row)}")
    return row_type(**values)
