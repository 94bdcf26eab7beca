"""The sections of a report: jobs, faults, leaderboard, settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_peft.training.display.progress_table import format_seconds
from moe_peft.training.folder.metrics import FINISHED, UNDER_WAY
from moe_peft.training.folder.run_status import JobStatus
from moe_peft.training.report.charts import short, sparkline
from moe_peft.training.report.contents import AdapterRows, Contents
from moe_peft.training.report.markup import Markup, folded, join, table, tag

# Skipped steps listed one by one, of one adapter.
MOST_SKIPPED = 5


def section(anchor: str, title: str, *children: object) -> Markup:
    """A part of the page with its headline."""
    return tag("section", tag("h2", title, id=anchor), *children, aria_labelledby=anchor)


def facts(contents: Contents) -> Markup:
    """The run in a few numbers."""
    jobs = contents.jobs
    num_finished = sum(job.state in FINISHED for job in jobs)
    num_bad = sum(job.state not in FINISHED + UNDER_WAY for job in jobs)
    skipped = sum(job.skipped_steps for job in jobs)
    seconds = sum(job.seconds for job in jobs)
    values = [
        ("adapters finished", f"{num_finished} of {len(jobs)}", _counted(jobs)),
        ("optimizer steps", f"{sum(job.step for job in jobs):,}", f"in {contents.num_fused_steps:,} fused steps"),
        (
            "tokens read",
            f"{sum(job.num_tokens for job in jobs):,}",
            f"{sum(job.num_supervised_tokens for job in jobs):,} with a loss",
        ),
        ("time of all steps", format_seconds(seconds), "added up over the adapters"),
        (
            "to look at",
            f"{num_bad + skipped + len(contents.alarms):,}",
            f"{num_bad} ended early, {skipped} skipped steps, {len(contents.alarms)} alarms",
        ),
    ]
    return tag(
        "dl",
        *(tag("div", tag("dt", label), tag("dd", value, tag("small", note))) for label, value, note in values),
        class_="facts",
    )


def _counted(jobs: Sequence[JobStatus]) -> str:
    states = [job.state for job in jobs]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def state_text(job: JobStatus) -> Markup:
    """A job's state in its colour, with the reason below it."""
    kind = "good" if job.state in FINISHED else "now" if job.state == "running" else "bad"
    if job.state in ("queued", "waiting"):
        kind = "soft"
    reason = job.reason if job.reason is not None else f"asked to {job.asked}" if job.asked else None
    return join(
        [
            tag("span", job.state, class_=f"state {kind}"),
            tag("span", reason, class_="reason") if reason is not None else None,
        ]
    )


def jobs_section(contents: Contents) -> Markup:
    """A row a job: how far it is and what it has come to."""
    lines = {adapter.name: adapter for adapter in contents.adapters}
    rows = [_job_row(job, lines.get(job.name)) for job in contents.jobs]
    head = ["adapter", "method", "state", "steps", "training loss", "", "held-out loss", "tokens", "time", "skipped"]
    return section(
        "jobs",
        "Jobs",
        tag("div", table(head, rows, caption="Every job of the run", class_="jobs"), class_="card"),
    )


def _job_row(job: JobStatus, adapter: AdapterRows | None) -> list[object]:
    num_steps = job.num_steps
    percent = 100 * job.step / num_steps if num_steps else 0
    steps = join(
        [
            tag("span", f"{job.step:,}" + (f" of {num_steps:,}" if num_steps else ""), class_="tight"),
            tag("span", tag("span", style=f"width:{min(100, percent):.0f}%"), class_="bar", aria_hidden="true"),
        ]
    )
    spark = sparkline(adapter.loss, f"Training loss of {job.name}") if adapter is not None else ""
    # A refused job may bear the name of another, whose rows are not its own.
    is_own = job.state != "refused"
    losses = [loss for _, loss in job.evals if loss is not None]
    held_out = " → ".join(f"{loss:.3f}" for loss in losses[:1] + losses[1:][-1:])
    return [
        tag("span", job.name, class_="name"),
        job.job.method if job.job is not None else "–",
        state_text(job),
        steps if is_own else "–",
        f"{job.loss:.3f}" if job.loss is not None else "–",
        spark if is_own else "",
        tag("span", held_out or "–", class_="tight"),
        f"{job.num_tokens:,}" if job.num_tokens else "–",
        format_seconds(job.seconds) if job.seconds else "–",
        job.skipped_steps or "–",
    ]


def _bold(text: str) -> Markup:
    return tag("b", text)


def faults_section(contents: Contents) -> Markup:
    """What went wrong, what looks wrong, and what was asked of the run from outside."""
    notes: list[Markup] = []
    for job in contents.jobs:
        if job.state not in FINISHED + UNDER_WAY:
            reason = f": {job.reason}" if job.reason is not None else ""
            notes.append(tag("li", _bold(job.name), f" {job.state} at step {job.step:,}{reason}"))
    for adapter in contents.adapters:
        for row in adapter.skipped[:MOST_SKIPPED]:
            notes.append(tag("li", _bold(adapter.name), f" skipped step {row.step:,}: {row.skipped}"))
        rest = len(adapter.skipped) - MOST_SKIPPED
        if rest > 0:
            notes.append(tag("li", _bold(adapter.name), f" skipped {rest} more"))
    notes += [tag("li", alarm) for alarm in contents.alarms]
    asked = [
        tag("li", f"before fused step {entry.fused_step + 1:,}: {entry.request.action} ", _bold(entry.request.adapter))
        for entry in contents.journal
    ]
    cards = [
        tag("ul", *notes, class_="notes") if notes else tag("p", "No fault, no skipped step, no alarm."),
        join([tag("h3", "Asked from outside"), tag("ul", *asked, class_="notes")]) if asked else None,
    ]
    shown = [tag("div", card, class_="card wide") for card in cards if card is not None]
    return section("faults", "Faults and alarms", tag("div", *shown, class_="cards"))


def leaderboard_section(contents: Contents) -> Markup | None:
    """The tables of ``leaderboard.json``: one a sweep, then all adapters; None without the file."""
    if contents.leaderboard is None:
        return None
    sweeps = [
        _leaderboard(f"Sweep {sweep['name']}", sweep["keys"], sweep["rows"]) for sweep in contents.leaderboard["sweeps"]
    ]
    rest = _leaderboard("All adapters", (), contents.leaderboard["rows"])
    note = tag("p", "Best first, by held-out loss, or else by training loss; ± is over seeds.", class_="soft")
    return section("leaderboard", "Leaderboard", note, tag("div", *sweeps, rest, class_="cards"))


def _leaderboard(caption: str, keys: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Markup:
    own = keys or ["adapter"]
    head = ["", *own, "seeds", "held-out loss", "training loss", "trainable", "tokens", "time", "state"]
    cells = [
        [
            place,
            *([_value(row["settings"].get(key, "–")) for key in keys] if keys else [row["label"]]),
            len(row["adapters"]),
            *(_spread(row[loss], "{:.4f}") for loss in ("eval_loss", "train_loss")),
            *(_spread(row[count], "{:,.0f}", with_std=False) for count in ("num_trainable", "num_tokens")),
            format_seconds(row["seconds"]["mean"]) if row["seconds"] is not None else "–",
            ", ".join(
                state if len(row["states"]) == 1 else f"{count} {state}" for state, count in row["states"].items()
            ),
        ]
        for place, row in enumerate(rows, start=1)
    ]
    return tag("div", table(head, cells, caption=caption, class_="board"), class_="card wide")


def _spread(spread: Mapping[str, Any] | None, template: str, *, with_std: bool = True) -> str:
    """A mean over seeds, ``1.2500 ± 0.0200``."""
    if spread is None:
        return "–"
    std = f" ± {template.format(spread['std'])}" if with_std and spread["std"] is not None else ""
    return template.format(spread["mean"]) + std


def _value(value: Any) -> str:
    """A setting as a cell shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return short(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_value(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(inner) for inner in value)
    return str(value)


def settings_section(contents: Contents) -> Markup:
    """What the adapters were trained with: first what tells them apart, then all of it."""
    config = contents.config.to_dict()
    entries = {job.name: job.job.to_dict() for job in contents.jobs if job.job is not None}
    keys = list(dict.fromkeys(key for entry in entries.values() for key in entry if key != "name"))
    # "" and None differ from a key that another method does not have.
    given = {key: [repr(entry[key]) if key in entry else None for entry in entries.values()] for key in keys}
    differing = [key for key in keys if len(set(given[key])) > 1]
    alike = [key for key in keys if key not in differing]
    first = next(iter(entries.values()), {})

    def cell(entry: Mapping[str, Any], key: str) -> str:
        return _value(entry[key]) if key in entry else ""

    own = [[name, *(cell(entry, key) for key in differing)] for name, entry in entries.items()]
    of_run = [[key, _value(value)] for key, value in config.items() if key not in ("adapters", "defaults")]
    parts = [
        tag("div", table(["adapter", *differing], own, caption="Where the adapters differ"), class_="card wide")
        if differing
        else None,
        tag("div", table(["key", "value"], of_run, caption="Of the run"), class_="card"),
        tag(
            "div",
            table(["key", "value"], [[key, cell(first, key)] for key in alike], caption="Alike for every adapter"),
            class_="card",
        )
        if alike
        else None,
        tag(
            "div",
            folded("config.yaml, as it was run", tag("pre", tag("code", contents.config.to_yaml()))),
            class_="card wide",
        ),
    ]
    return section("settings", "Settings", tag("div", *parts, class_="cards"))
