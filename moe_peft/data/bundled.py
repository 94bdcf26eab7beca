"""The small tasks that come with the package, found by name."""

import difflib
from importlib import resources
from pathlib import Path

PREFIX = "bundled:"
# What a spec may end in, and the file name's part that it stands for.
PARTS = {"": "train", ":eval": "eval"}


def bundled_names() -> tuple[str, ...]:
    """The bundled tasks, in alphabetical order."""
    files = resources.files("moe_peft.data").joinpath("tasks").iterdir()
    return tuple(sorted(file.name.removesuffix(".train.jsonl") for file in files if file.name.endswith(".train.jsonl")))


def bundled_records_path(spec: str) -> Path:
    """The file of a bundled task's records.

    Args:
        spec: ``bundled:NAME`` for its training records, ``bundled:NAME:eval`` for the held-out ones.

    Raises:
        ValueError: when there is no such task or part, with the nearest one there is.
    """
    specs = {
        f"{PREFIX}{name}{ending}": f"{name}.{part}.jsonl" for name in bundled_names() for ending, part in PARTS.items()
    }
    if spec not in specs:
        nearest = difflib.get_close_matches(spec, specs, n=1, cutoff=0.0)
        raise ValueError(f"{spec!r} is not a bundled data set (nearest: {nearest[0]}; there are: {', '.join(specs)})")
    # A package imported from a zip archive has no such path, and reading it then says so.
    return Path(str(resources.files("moe_peft.data").joinpath("tasks", specs[spec])))
