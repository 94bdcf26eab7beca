"""One HTML page about a run, whole in itself: no script, nothing from the network."""

from pathlib import Path

from moe_peft.io.atomic import write_text_atomically
from moe_peft.training.report.charts import dimming_style
from moe_peft.training.report.contents import Contents, read_contents
from moe_peft.training.report.markup import Markup, join, tag
from moe_peft.training.report.pictures import adapters_section, curves_section, experts_section
from moe_peft.training.report.sections import (
    facts,
    faults_section,
    jobs_section,
    leaderboard_section,
    settings_section,
)
from moe_peft.training.report.style import STYLE

REPORT_FILE = "report.html"
# The browser itself sees to it that nothing is fetched and no script runs, whatever a name or a reason may hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    Args:
        run_dir: the run's folder; only config.yaml, metrics.jsonl, journal.jsonl and leaderboard.json are read.
        output: the file to write; None: ``report.html`` in the run's folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not the folder of a run, or a file in it is damaged.
    """
    path = Path(run_dir).expanduser() / REPORT_FILE if output is None else Path(output).expanduser()
    write_text_atomically(path, render(read_contents(run_dir)))
    return path


def render(contents: Contents) -> str:
    """The page."""
    sections = {
        "jobs": ("Jobs", jobs_section(contents)),
        "faults": ("Faults and alarms", faults_section(contents)),
        "leaderboard": ("Leaderboard", leaderboard_section(contents)),
        "curves": ("Curves", curves_section(contents)),
        "adapters": ("Each adapter", adapters_section(contents)),
        "experts": ("Experts", experts_section(contents)),
        "settings": ("Settings", settings_section(contents)),
    }
    present = {anchor: part for anchor, part in sections.items() if part[1] is not None}
    links = tag("nav", *(tag("a", title, href=f"#{anchor}") for anchor, (title, _) in present.items()))
    body = tag(
        "main",
        tag("header", tag("h1", contents.title), _subtitle(contents), links),
        facts(contents),
        *(part for _, part in present.values()),
        class_="page",
    )
    places = max((adapter.place for adapter in contents.adapters), default=-1) + 1
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{contents.title}: training report"),
        tag("style", Markup(STYLE + dimming_style(places))),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"


def _subtitle(contents: Contents) -> Markup:
    config = contents.config
    state = "finished"
    if contents.trained_by is not None:
        state = f"being trained by {contents.trained_by}"
    elif contents.is_under_way:
        state = "not finished, and nobody trains it at the moment"
    return tag(
        "p",
        join([f"{config.base_model}, {config.dtype} on {config.device}; seed {config.seed}; {state}"]),
        class_="soft",
    )
