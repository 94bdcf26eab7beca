"""The report: a page whole in itself, with every number where it belongs and every text escaped."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from report_run import adapter_rows, step_row, write_config, write_rows

from moe_peft.report import main
from moe_peft.training.folder.metrics import JobMetrics
from moe_peft.training.report.charts import line_chart, nice_ticks, short
from moe_peft.training.report.heatmap import heat_map
from moe_peft.training.report.markup import Markup, folded, table, tag
from moe_peft.training.report.page import write_report
from moe_peft.training.report.series import Series, table_rows

VOID = {"meta", "br"}


class Page(HTMLParser):
    """What a page holds, read by Python's own parser; a tag that is closed wrongly is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.by_tag = [], [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, key, value) for key, value in attributes]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.texts.append(text)
            self.by_tag.setdefault(self.open[-1], []).append(text)

    @property
    def text(self):
        return " ".join(self.texts)


def report(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def refers_outside(page):
    return [
        (name, key, value)
        for name, key, value in page.attributes
        if (key in ("src", "href", "xlink:href", "srcset", "data", "action") and not value.startswith("#"))
        or "url(" in (value or "")
        or key.startswith("on")
    ]


@pytest.fixture
def run(tmp_path):
    """A run with one of everything: a mixture that collapses, a failure, an early stop, a refusal."""
    folder = tmp_path / "run-007"
    write_config(folder, ["home-moe", "qa", "odd"])
    failed = adapter_rows("odd", 40, "failed", reason="gradient norm inf must be <finite> & small")
    failed[2:2] = [step_row("odd", 1, loss=float("nan"), skipped="loss is nan", skipped_steps=1)]
    rows = [
        *adapter_rows("home-moe", saved_to="adapters/home-moe"),
        *adapter_rows("qa", 75, "early-stopped", reason="no better since step 50"),
        *failed,
        JobMetrics(adapter="<img src=x onerror=alert(1)>", state="refused", reason="name='<b>' & \"so on\""),
    ]
    write_rows(folder, rows)
    return folder


def test_a_page_tells_everything_of_a_run(run):
    page = report(run)
    titles = ["Jobs", "Faults and alarms", "Curves", "Each adapter", "Experts", "Settings"]
    assert page.by_tag["h2"] == titles and page.by_tag["a"] == titles
    assert page.by_tag["h1"] == ["run-007"]
    for name in ("home-moe", "qa", "odd"):
        assert name in page.by_tag["h3"]
    for text in (
        "2 of 4",
        "gradient norm inf must be <finite> & small",
        "no better since step 50",
        "home-moe, step 50: collapsed router: layer 1, 99% to expert 2 (for 50 steps)",
        "home-moe, step 50: dead experts: layer 2, expert 0",
        "skipped step 1: loss is nan",
        "base & more",
    ):
        assert text in page.text, text
    # First and last held-out loss, as they were written.
    assert f"{3.1:.3f} → {3.1 * np.exp(-100 / 50):.3f}" in page.text


def test_nothing_comes_from_outside_and_nothing_runs(run):
    page = report(run)
    assert refers_outside(page) == []
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    style = re.search(r"<style>(.*?)</style>", (run / "report.html").read_text(encoding="utf-8"), re.S)[1]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme:dark" in style
    assert refers_outside(Page('<p><a href="//x.org"></a><i onclick="x()"></i></p>')) != []


def test_every_text_of_a_user_is_escaped(run):
    page = report(run)
    assert "<img src=x onerror=alert(1)>" in page.texts
    assert any("name='<b>' & \"so on\"" in text for text in page.texts)


def test_every_picture_has_a_name_and_its_numbers(run):
    page = report(run)
    names = [value for name, key, value in page.attributes if name == "svg" and key == "aria-label"]
    for name in ("Training loss", "Held-out loss", "Learning rate", "Speed", "Router losses", "Losses of odd"):
        assert name in names
    assert "Expert load of home-moe: all 100 steps" in names and "Expert load of home-moe: the last 10%" in names
    captions = page.by_tag["caption"]
    assert {name for name in names if not name.startswith("Training loss of ")} <= set(captions)


def test_a_run_under_way(tmp_path):
    folder = tmp_path / "run"
    write_config(folder, ["qa", "late"])
    rows = [*adapter_rows("qa", 30, None), JobMetrics(adapter="late", state="queued")]
    write_rows(folder, rows)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "adap')  # the trainer is in the middle of a row
    page = report(folder)
    assert "not finished" in page.text and "0 of 2" in page.text and "30 of 100" in page.text
    assert {"running", "queued"} <= set(page.by_tag["span"])


def test_a_run_that_took_no_step(tmp_path):
    folder = tmp_path / "run"
    write_config(folder, ["qa-moe"])
    page = report(folder)
    assert "No step was taken yet." in page.text and "No fault, no skipped step, no alarm." in page.text
    assert page.by_tag["h2"] == ["Jobs", "Faults and alarms", "Curves", "Settings"]


def test_a_run_without_held_out_data(tmp_path):
    folder = tmp_path / "run"
    write_config(folder, ["qa"])
    write_rows(folder, [step_row("qa", step) for step in range(1, 4)])
    page = report(folder)
    assert "Held-out loss" not in page.by_tag["h3"] and "Training loss" in page.by_tag["h3"]


def test_twenty_adapters(tmp_path):
    folder = tmp_path / "run"
    names = [f"customer-{i:02d}{'-moe' if i % 5 == 0 else ''}" for i in range(20)]
    write_config(folder, names)
    write_rows(folder, [row for name in names for row in adapter_rows(name)])
    page = report(folder)
    assert [text for text in page.by_tag["h3"] if text in names] == names + names[::5]
    assert (folder / "report.html").stat().st_size < 2_000_000


def test_the_leaderboard_is_shown_as_it_is_written(run):
    def spread(mean, std=None):
        return {"mean": mean, "std": std, "count": 2}

    row = {
        "label": "rate",
        "settings": {"lr": 0.0005},
        "adapters": ["rate-1", "rate-2"],
        "states": {"done": 2},
        "eval_loss": spread(1.25, 0.03125),
        "train_loss": spread(1.0),
        "num_trainable": spread(123456.0),
        "num_tokens": spread(9000.0),
        "num_supervised_tokens": None,
        "seconds": spread(75.0, 1.0),
    }
    board = {"sweeps": [{"name": "rate", "keys": ["lr"], "rows": [row]}], "rows": [row, {**row, "eval_loss": None}]}
    (run / "leaderboard.json").write_text(json.dumps(board))
    page = report(run)
    assert "Leaderboard" in page.by_tag["h2"] and {"Sweep rate", "All adapters"} <= set(page.by_tag["caption"])
    assert {"1.2500 ± 0.0312", "1.0000", "123,456", "1:15", "5e-4", "done"} <= set(page.by_tag["td"])


def test_requests_from_outside_are_told(run):
    entry = {"fused_step": 12, "id": "1-a", "action": "stop", "adapter": "qa"}
    (run / "journal.jsonl").write_text(json.dumps(entry) + "\n")
    assert "before fused step 13: stop" in report(run).text


def test_a_chart_draws_what_its_numbers_say():
    line = Series("qa", 3, np.array([1.0, 2, 3, 4, 5]), np.array([0.0, 10, np.nan, 5, 0]))
    svg = line_chart("Loss of qa", "loss", [line], width=200, height=100)
    (path,) = re.findall(r'<path d="([^"]*)" class="line"', svg)
    assert path.count("M") == 2 and path.count("L") == 2, "a gap breaks the line"
    points = [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([\d.]+ [\d.]+)", path)]
    (x1, y1), (x2, y2), (x4, y4), (x5, y5) = points
    assert y1 == y5 > y4 > y2 and y4 - y2 == pytest.approx((y1 - y2) / 2, abs=0.2)
    assert x4 - x2 == pytest.approx(2 * (x5 - x4), abs=0.2) and x2 - x1 == pytest.approx(x5 - x4, abs=0.2)
    assert 'class="series s3 c3"' in svg


def test_one_wild_step_does_not_flatten_a_chart():
    values = np.append(np.linspace(3, 1, 400), 1e6)
    line = Series("qa", 0, np.arange(401.0), values)
    assert "higher values are cut" in line_chart("Loss", "loss", [line])
    assert "higher values are cut" not in line_chart("Loss", "loss", [Series("qa", 0, np.arange(400.0), values[:-1])])


def test_thinning_keeps_every_spike_and_both_ends():
    values = np.sin(np.arange(10_000) / 500)
    values[[1234, 7777]] = 9.0, -9.0
    line = Series("qa", 0, np.arange(10_000.0), values).thinned(300)
    assert len(line.x) <= 302 and {0, 1234, 7777, 9999} <= set(line.x.astype(int))
    np.testing.assert_array_equal(line.y, values[line.x.astype(int)])
    assert (np.diff(line.x) > 0).all()


def test_a_table_of_a_chart_has_each_lines_end():
    long = Series("a", 0, np.arange(1.0, 501), np.arange(1.0, 501))
    brief = Series("b", 1, np.arange(1.0, 38), np.arange(1.0, 38))
    rows = dict(table_rows([long, brief]))
    assert len(rows) <= 18 and rows[500][0] == 500 and rows[37] == [37, 37]
    assert rows[1] == [1, 1] and np.isnan(rows[500][1])


def test_numbers_and_ticks_are_round():
    assert [short(x) for x in (0, 2e-4, 0.00123, 1.2345, 12400.0, float("nan"))] == [
        *("0", "2e-4", "0.00123", "1.23", "12,400", "–")
    ]
    assert nice_ticks(0.0, 3.1) == [0.0, 1.0, 2.0, 3.0]
    assert nice_ticks(1.0, 300.0, 9) == [50.0, 100.0, 150.0, 200.0, 250.0, 300.0]
    for high in (0.013, 0.9, 7.7, 123.0, 4e5):
        ticks = nice_ticks(0.0, high)
        assert 3 <= len(ticks) <= 6 and all(0 <= tick <= high for tick in ticks)


def test_a_heat_map_marks_the_full_and_the_dead():
    svg = heat_map(np.array([[10, 10, 10, 10], [40, 0, 0, 0], [0, 0, 0, 0]]), "Load")
    cells = re.findall(r'class="(over|under|dead)" fill-opacity="([\d.]+)"><title>([^<]*)', svg)
    assert len(cells) == 12
    found = {title: (side, float(opacity)) for side, opacity, title in cells}
    assert found["layer 1, expert 0: 100.0% of the tokens"] == ("over", 1.0)
    assert found["layer 1, expert 3: 0.0% of the tokens"] == ("dead", 1.0)
    assert found["layer 0, expert 2: 25.0% of the tokens"][1] == pytest.approx(0.06)
    assert "layer 2, expert 1: no token" in found


def test_markup_escapes_whatever_is_not_markup():
    assert tag("a", "R&D", Markup("<b>x</b>"), None, 3, href='"', class_="c", data_x=None) == (
        '<a href="&quot;" class="c">R&amp;D<b>x</b>3</a>'
    )
    assert "<script>" not in table(["<script>"], [["<script>", "<script>"]], caption="<script>")
    assert folded("<", "<") == "<details><summary>&lt;</summary>&lt;</details>"


def test_the_command_writes_the_page_and_tells_where(run, tmp_path, capsys):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main([str(run), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_bytes() == (run / "report.html").read_bytes()


def test_the_command_refuses_what_is_no_run(run, tmp_path, capsys):
    for argv, said in (
        ([], "RUN_DIR is missing"),
        ([str(run) + "x"], "did you mean"),
        ([str(tmp_path)], "not the folder of a training run"),
        ([str(run), "--output", str(tmp_path)], "must be a file"),
        ([str(run), "--outptu", "x"], "did you mean '--output'?"),
    ):
        assert main(argv) == 2
        assert said in capsys.readouterr().err
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("broken\n")
    assert main([str(run)]) == 2
    assert "metrics.jsonl, line" in capsys.readouterr().err
    assert not (run / "report.html").exists()
