"""The report in a real browser: read as it was written, drawn, without a complaint and without a network."""

import re
import shutil
import subprocess
from collections import Counter

import pytest
from report_run import adapter_rows, write_config, write_rows

from moe_peft.training.report.page import POLICY, write_report

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install -y chromium)"),
]
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers keep it too small for a tall page
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
)


def browse(page, folder, *options):
    """What chromium prints of a page, and its complaints: the lines of its console."""
    profile = folder / "profile"
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def tags(text):
    """How often each element begins, without what stands in the style."""
    return Counter(re.findall(r"<([a-zA-Z][a-zA-Z0-9]*)", re.sub(r"<style>.*?</style>", "<style>", text, flags=re.S)))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "run"
    write_config(folder, ["home-moe", "qa", "odd"])
    failed = adapter_rows("odd", 40, "failed", reason="<script>document.title='owned'</script>")
    write_rows(folder, [*adapter_rows("home-moe"), *adapter_rows("qa", 60, None), *failed])
    return write_report(folder)


def test_the_browser_reads_what_was_written(page, tmp_path):
    dom, complaints = browse(page, tmp_path, "--dump-dom")
    assert complaints == []
    # Where markup is wrong a browser mends it: it closes, moves and adds elements.
    assert tags(dom) == tags(page.read_text(encoding="utf-8"))
    assert "<title>run: training report</title>" in dom and "&lt;script&gt;document.title" in dom
    assert len(re.findall(r'<svg[^>]* class="chart"', dom)) >= 9 and len(re.findall(r'class="heat"', dom)) == 2


def pixels(path):
    image = pytest.importorskip("PIL.Image", reason="pillow reads the picture").open(path).convert("RGB")
    return Counter(image.get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata()), image.size


def test_the_browser_draws_it_light_and_dark(page, tmp_path):
    seen = {}
    # 1 is light, 0 dark: blink's own numbers.
    for name, scheme in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{name}.png"
        _, complaints = browse(
            page,
            tmp_path,
            "--window-size=1280,4200",
            f"--screenshot={picture}",
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        assert complaints == []
        colours, size = pixels(picture)
        assert size == (1280, 4200)
        seen[name] = {colour for colour, count in colours.items() if count > 30}
        assert len(seen[name]) > 60, "text and lines have many shades; a blank page has one"
        assert max(colours.values()) < 0.9 * 1280 * 4200
    # The page, the first adapter's line, an overloaded expert: each scheme's own, as the style has them.
    for colour in ("f6f6f3", "2868d8", "c4401c"):
        assert tuple(bytes.fromhex(colour)) in seen["light"] - seen["dark"], colour
    for colour in ("12151a", "6ea2ff", "f0693e"):
        assert tuple(bytes.fromhex(colour)) in seen["dark"] - seen["light"], colour


def test_a_complaint_would_show(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<!doctype html><title>x</title><script>throw new Error("a fault")</script>', encoding="utf-8")
    assert any("a fault" in line for line in browse(page, tmp_path, "--dump-dom")[1])
    policy = f'<!doctype html><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    for body in ('<img src="http://example.org/x.png">', '<script>document.title = "owned"</script>'):
        page.write_text(policy + body, encoding="utf-8")
        dom, complaints = browse(page, tmp_path, "--dump-dom")
        assert complaints != [] and "<title>" not in dom, "the report's policy fetches nothing and runs nothing"
