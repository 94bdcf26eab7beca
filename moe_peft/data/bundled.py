"""The small tasks that come with the package, found by name."""

from importlib import resources
from pathlib import Path

from moe_peft.strict import nearest

PREFIX = "bundled:"
# What a data set's name may end in, and the part of the task that it stands for.
PARTS = {"": "train", ":eval": "eval"}


def bundled_names() -> tuple[str, ...]:
    """The bundled tasks, in alphabetical order."""
    files = (file.name for file in resources.files("moe_peft.data").joinpath("tasks").iterdir())
    return tuple(sorted(name.removesuffix(".train.jsonl") for name in files if name.endswith(".train.jsonl")))


def bundled_records_path(spec: str) -> Path:
    """The file of a bundled task's records.

    Args:
        spec: ``bundled:NAME`` for the training records of a task, ``bundled:NAME:eval`` for the held-out ones.

    Raises:
        ValueError: when there is no such task or part, with the nearest one there is.
    """
    files = {f"{PREFIX}{name}{end}": f"{name}.{part}.jsonl" for name in bundled_names() for end, part in PARTS.items()}
    if spec not in files:
        raise ValueError(f"{spec!r} is not a bundled data set{nearest(spec, files)}")
    return Path(str(resources.files("moe_peft.data").joinpath("tasks", files[spec])))
