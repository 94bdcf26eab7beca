"""The entries of ``adapters`` in a file, over its defaults, as jobs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_peft import strict
from moe_peft.config.grid import Grid, heads_of, lists_of, means_something
from moe_peft.config.job import ADAPTER_NAME, AdapterJob, adapter_keys
from moe_peft.config.sweep import OPTIONS, Sweep, check_members

Place = tuple[str, AdapterJob]  # where a job's entry stands in its file, such as adapters[1], and the job


def read_entries(
    entries: Sequence[Any], defaults: object, elsewhere: Mapping[str, str]
) -> tuple[list[AdapterJob], list[Sweep]]:
    """Reads the entries of ``adapters`` over the defaults, an entry with lists as the grid it stands for.

    Args:
        elsewhere: what to say of a key that belongs to another place than an adapter.

    Returns:
        The jobs, and a sweep for every entry with lists.

    Raises:
        ValueError: on what is wrong with an entry, and on a default that reaches none.
    """
    remarks = {**elsewhere, "name": "each adapter needs its own: put it in its entry"}
    defaults = strict.check_keys(defaults, [key for key in adapter_keys(None) if key != "name"], "defaults", remarks)
    places: list[Place] = []
    sweeps, reached = [], set[str]()
    for index, entry in enumerate(entries):
        path = f"adapters[{index}]"
        if not isinstance(entry, Mapping):
            places.append((path, strict.coerce(entry, AdapterJob, path)))
            continue
        inherited = _inherited(entry, defaults)
        reached |= inherited.keys()
        try:
            jobs, sweep = _read_entry({**inherited, **entry}, path, elsewhere)
        except ValueError as error:
            subject = re.match(rf"{re.escape(path)}\.(\w+)", str(error))
            if subject and subject[1] in inherited and subject[1] not in entry:
                raise ValueError(f"{error} (the value comes from defaults)") from error
            raise
        places += [(path, job) for job in jobs]
        sweeps += [sweep] if sweep else []
    for key in defaults:
        if key not in reached:
            lacks = "a key with a list" if key == "sweep" else "a method or an optimizer with this key"
            raise ValueError(f"defaults.{key}={strict.show(defaults[key])} reaches no adapter: none has {lacks}")
    check_unique_names(places)
    return [job for _, job in places], sweeps


def _inherited(entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that can mean something to this entry: those of its methods and of its optimizers."""
    heads = heads_of({**defaults, **entry})
    kept = {
        key: value for key, value in defaults.items() if any(means_something(key, *head.values()) for head in heads)
    }
    if isinstance(kept.get("sweep"), Mapping) and not lists_of({**kept, **entry}):
        del kept["sweep"]
    return kept


def _read_entry(
    entry: Mapping[str, Any], path: str, elsewhere: Mapping[str, str]
) -> tuple[list[AdapterJob], Sweep | None]:
    """The jobs of one entry, and the sweep that they form where it has lists."""
    grid = Grid(entry, path)
    name, options = entry.get("name"), entry.get("sweep")
    if not grid.lists:
        if isinstance(options, Mapping):
            raise ValueError(
                f"{path}.sweep={strict.show(options)} needs a key with a list of values, as lr: [1e-4, 2e-4]"
            )
        return [AdapterJob.from_dict(entry, path, elsewhere)], None
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        AdapterJob.from_dict({**grid.points[0].values, "sweep": None}, path, elsewhere)  # refuses the name
        raise AssertionError(f"{name!r} is no name")
    if isinstance(options, str):
        key = next(iter(grid.lists))
        raise ValueError(f"{path}.sweep={options!r} puts it into a sweep, so {key} must be one value, not a list")
    sweep = _read_sweep(name, {} if options is None else options, path)
    jobs = []
    for member, point in zip(grid.names(name), grid.points, strict=True):
        try:
            jobs.append(AdapterJob.from_dict({**point.values, "name": member, "sweep": name}, path, elsewhere))
        except ValueError as error:
            raise ValueError(grid.locate(str(error), point)) from error
    check_members(sweep, [(path, job) for job in jobs])
    return jobs, sweep


def _read_sweep(name: str, options: object, path: str) -> Sweep:
    path = strict.join(path, "sweep")
    values = strict.check_keys(options, OPTIONS, path)
    return strict.build(Sweep, {"name": name, **values}, path)


def check_unique_names(places: Iterable[Place]) -> None:
    """Refuses two adapters of one name, case aside: on some file systems they would be one folder.

    Raises:
        ValueError: naming both entries.
    """
    seen: dict[str, Place] = {}
    for path, job in places:
        first, other = seen.setdefault(job.name.lower(), (path, job))
        if other is not job:
            has = "has a member named" if other.sweep else "is named"
            case = " (names become folders, so case does not tell them apart)" if other.name != job.name else ""
            raise ValueError(f"{path}.name={job.name!r} must be unique: {first} {has} {other.name!r}{case}")
