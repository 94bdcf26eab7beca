"""The two reports: right arithmetic, and text that comes out as it went in."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from moe_peft.training.display.summary import (
    AdapterResult,
    AdapterSummary,
    AnswerExample,
    closing_report,
    format_change,
    parameters_table,
    print_report,
)


def plain_text(report):
    console = Console(file=io.StringIO(), width=40)
    print_report(console, report)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def cells(text, first):
    """The cells of the row that starts with ``first``."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def make_summary(**changes):
    fields = {
        "name": "qa",
        "method": "mixlora",
        "num_trainable": 2_000_000,
        "num_base": 134_515_008,
        "num_samples": 1234,
        "num_steps": 60,
    }
    return AdapterSummary(**{**fields, **changes})


def test_parameters_table():
    text = plain_text(parameters_table([make_summary(num_truncated=3), make_summary(name="none", num_trainable=0)]))
    assert cells(text, "qa") == ["qa", "mixlora", "2,000,000", "1.49%", "67.3×", "1,234", "3", "60"]
    assert cells(text, "none") == ["none", "mixlora", "0", "0%", "–", "1,234", "0", "60"]
    assert "skipped" not in text


def test_skipped_samples_get_a_column_when_there_are_any():
    text = plain_text(parameters_table([make_summary(num_skipped=7)]))
    assert "skipped" in text and cells(text, "qa")[-2:] == ["7", "60"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(2.0, 0.5, "-75.0%"), (2.0, 2.5, "+25.0%"), (None, 1.0, "–"), (1.0, None, "–"), (0.0, 1.0, "–")],
)
def test_format_change(before, after, expected):
    assert format_change(before, after) == expected


def test_closing_report():
    example = AnswerExample(
        prompt="Turn it [bold]on[/bold].", expected="on()", base_answer="[1] Sure!", adapter_answer="on()"
    )
    results = [
        AdapterResult(
            name="qa",
            state="done",
            num_steps=60,
            seconds=125.0,
            eval_loss_before=2.0,
            eval_loss_after=0.5,
            saved_to=Path("runs/" + "a-folder-of-a-long-name/" * 8 + "qa"),
            examples=(example, example),
        ),
        AdapterResult(name="broken", state="failed", reason="non-finite loss at step 3", num_steps=2, seconds=3.0),
    ]
    text = plain_text(closing_report(results))
    assert cells(text, "qa") == ["qa", "2.000", "0.500", "-75.0%", "60", "2:05", "done"]
    assert cells(text, "broken")[:6] == ["broken", "–", "–", "–", "2", "0:03"]
    assert "non-finite loss at step 3" in text
    assert text.count("Turn it [bold]on[/bold].") == 2 and text.count("[1] Sure!") == 2
    # A path is for copying, so no line break may fall into it.
    assert f"qa: saved to {results[0].saved_to}\n" in text
    assert "broken: not saved\n" in text
    assert "\x1b" not in text


def test_skipped_steps_get_a_column_when_there_are_any():
    fields = {"state": "done", "num_steps": 60, "seconds": 125.0}
    calm = AdapterResult(name="calm", **fields)
    assert "skipped" not in plain_text(closing_report([calm]))
    text = plain_text(closing_report([calm, AdapterResult(name="qa", skipped_steps=3, **fields)]))
    assert cells(text, "adapter")[-4:] == ["steps", "skipped", "time", "status"]
    assert cells(text, "calm")[-4:] == ["60", "0", "2:05", "done"]
    assert cells(text, "qa")[-4:] == ["60", "3", "2:05", "done"]


def test_an_empty_answer_is_shown_as_such():
    example = AnswerExample(prompt="p", expected="e", base_answer=" \n", adapter_answer="")
    result = AdapterResult(name="qa", state="done", num_steps=1, seconds=1.0, examples=(example,))
    assert plain_text(closing_report([result])).count("(nothing)") == 2


def test_a_narrow_terminal_folds_text_and_keeps_the_path_whole():
    example = AnswerExample(prompt="word " * 30, expected="e", base_answer="b", adapter_answer="a")
    path = Path("runs/" + "x" * 100)
    result = AdapterResult(name="qa", state="done", num_steps=1, seconds=1.0, saved_to=path, examples=(example,))
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    print_report(console, closing_report([result]))
    lines = console.file.getvalue().splitlines()
    assert lines[-1] == f"qa: saved to {path}"
    assert max(len(line) for line in lines[:-1]) <= 60
    assert sum(line.count("word") for line in lines) == 30
