"""The leaderboard of a run, from the files in its folder: which adapters came out best, as a mean over their seeds."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_peft.config import Sweep
from moe_peft.io.atomic import write_text_atomically
from moe_peft.training.display.progress_table import format_seconds
from moe_peft.training.folder.run_status import read_run
from moe_peft.training.folder.standings import LAST_STEPS, Standing, read_standings

MARKDOWN_FILE, JSON_FILE = "leaderboard.md", "leaderboard.json"


@dataclass(frozen=True)
class Spread:
    """A mean, and the sample standard deviation where there are two numbers or more."""

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, numbers: Iterable[float | None]) -> "Spread | None":
        """That of the numbers there are; None when there are none."""
        known = [number for number in numbers if number is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Row:
    """Adapters that are equal but for their seed; the losses are those of the ones that did not fail.

    Args:
        standings: one an adapter, at least one.
    """

    standings: tuple[Standing, ...]

    @property
    def _counted(self) -> list[Standing]:
        return [standing for standing in self.standings if standing.state != "failed"]

    @property
    def eval_loss(self) -> Spread | None:
        """Held-out loss."""
        return Spread.of(standing.eval_loss for standing in self._counted)

    @property
    def train_loss(self) -> Spread | None:
        """Training loss."""
        return Spread.of(standing.train_loss for standing in self._counted)

    @property
    def label(self) -> str:
        """The adapters' common name without their seeds, or all their names."""
        names = [standing.name for standing in self.standings]
        stems = {re.sub(r"-seed(\d+|_null)$", "", name) for name in names}
        return stems.pop() if len(stems) == 1 else ", ".join(names)

    @property
    def order(self) -> tuple[int, float]:
        """Smaller is better: by held-out loss, then those without one by training loss, then the rest."""
        for place, spread in enumerate((self.eval_loss, self.train_loss)):
            if spread is not None:
                return place, spread.mean
        return 2, 0.0

    def to_dict(self, keys: Sequence[str]) -> dict[str, Any]:
        """The row as plain data.

        Args:
            keys: of the settings to tell.
        """
        spreads = {"eval_loss": self.eval_loss, "train_loss": self.train_loss}
        for key in ("num_trainable", "num_tokens", "num_supervised_tokens", "seconds"):
            spreads[key] = Spread.of(getattr(standing, key) for standing in self.standings)
        return {
            "label": self.label,
            "settings": {key: value for key, value in self.standings[0].settings.items() if key in keys},
            "adapters": [standing.name for standing in self.standings],
            "states": dict(Counter(standing.state for standing in self.standings)),
            **{key: None if spread is None else asdict(spread) for key, spread in spreads.items()},
        }


def rank(standings: Iterable[Standing]) -> list[Row]:
    """The rows of a leaderboard, best first; between equals the order of the adapters decides."""
    groups: dict[str, list[Standing]] = {}
    for standing in standings:
        same = {key: value for key, value in standing.settings.items() if key not in ("name", "sweep", "seed")}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(standing)
    return sorted((Row(tuple(group)) for group in groups.values()), key=lambda row: row.order)


def varying_keys(standings: Sequence[Standing]) -> list[str]:
    """The settings in which adapters that have them differ, the name and the seed aside."""
    values: dict[str, set[str]] = {}
    for standing in standings:
        for key, value in standing.settings.items():
            values.setdefault(key, set()).add(json.dumps(value))
    return [key for key, found in values.items() if len(found) > 1 and key not in ("name", "sweep", "seed")]


def leaderboard(folder: str | Path) -> dict[str, Any]:
    """The leaderboard of a run's folder as plain data: ``sweeps``, each with its rows, all ``rows``, and ``adapters``.

    Raises:
        FileNotFoundError, ValueError: as :func:`moe_peft.training.folder.run_status.read_run`.
    """
    run = read_run(folder)
    standings = read_standings(run)
    sweeps = {sweep.name: sweep for sweep in run.config.sweeps}
    for standing in standings:  # a submitted adapter's sweep is not in the config
        if standing.sweep is not None:
            sweeps.setdefault(standing.sweep, Sweep(name=standing.sweep))
    tables = []
    for sweep in sweeps.values():
        members = [standing for standing in standings if standing.sweep == sweep.name]
        keys = varying_keys(members)
        tables.append({**asdict(sweep), "keys": keys, "rows": [row.to_dict(keys) for row in rank(members)]})
    return {
        "sweeps": tables,
        "rows": [row.to_dict(()) for row in rank(standings)],
        "adapters": [asdict(standing) for standing in standings],
    }


def write_leaderboard(folder: str | Path) -> None:
    """Writes ``leaderboard.md`` and ``leaderboard.json`` into a run's folder.

    Raises:
        FileNotFoundError, ValueError: as :func:`moe_peft.training.folder.run_status.read_run`.
        OSError: when they cannot be written.
    """
    folder = Path(folder).expanduser()
    data = leaderboard(folder)
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomically(folder / JSON_FILE, text)
    write_text_atomically(folder / MARKDOWN_FILE, render_markdown(data))


def render_markdown(data: Mapping[str, Any]) -> str:
    """What :func:`leaderboard` gave, as a page of tables."""
    parts = [
        "# Leaderboard",
        "Best first, by held-out loss; adapters without held-out records follow, by training loss (the mean of the "
        f"last {LAST_STEPS} steps). Adapters that differ in their seed only share a row: mean ± standard deviation. "
        "Tokens and time are those of one adapter.",
    ]
    for sweep in data["sweeps"]:
        parts.append(f"## Sweep {sweep['name']}")
        if sweep["halve_every"] is not None:
            parts.append(
                f"Every {sweep['halve_every']} steps the best {100 * sweep['keep']:g}% went on, by {sweep['metric']}."
            )
        heads = [[_cell(row["settings"], key) for key in sweep["keys"]] for row in sweep["rows"]]
        parts.append(_table(sweep["keys"], heads, sweep["rows"]))
    parts += ["## All adapters", _table(["adapter"], [[row["label"]] for row in data["rows"]], data["rows"])]
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], heads: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> str:
    titles = ["seeds", "held-out loss", "training loss", "trainable", "tokens", "time", "state"]
    lines = [["", *columns, *titles], ["--:", *[":--"] * len(columns), *["--:"] * (len(titles) - 1), ":--"]]
    for number, (head, row) in enumerate(zip(heads, rows, strict=True), start=1):
        has_rank = row["eval_loss"] is not None or row["train_loss"] is not None
        states = [state if len(row["states"]) == 1 else f"{count} {state}" for state, count in row["states"].items()]
        lines.append(
            [
                str(number) if has_rank else "–",
                *head,
                str(len(row["adapters"])),
                _loss(row["eval_loss"], len(row["adapters"])),
                _loss(row["train_loss"], len(row["adapters"])),
                _count(row["num_trainable"]),
                _count(row["num_tokens"]),
                "–" if row["seconds"] is None else format_seconds(row["seconds"]["mean"]),
                ", ".join(states),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _loss(spread: Mapping[str, Any] | None, num_adapters: int) -> str:
    if spread is None:
        return "–"
    text = f"{spread['mean']:.4f}" + ("" if spread["std"] is None else f" ± {spread['std']:.4f}")
    return text + ("" if spread["count"] == num_adapters else f" ({spread['count']} of {num_adapters})")


def _count(spread: Mapping[str, Any] | None) -> str:
    return "–" if spread is None else f"{round(spread['mean']):,}"


def _cell(settings: Mapping[str, Any], key: str) -> str:
    """A setting as YAML would have it; a dash where the adapter's method has no such key."""
    if key not in settings:
        return "–"
    value = settings[key]
    text = value if isinstance(value, str) else json.dumps(value).replace('"', "")
    return text.replace("|", "\\|")
