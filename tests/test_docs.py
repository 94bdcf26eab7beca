"""Every example in the docs and in ``--help`` is run, or at least read, by the code that it speaks of."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import metadata
from io import StringIO
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
import tiny_run
import yaml

import moe_peft
from moe_peft import TrainConfig, cli
from moe_peft.io.smollm2 import smollm2_file
from moe_peft.training.folder.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# What this file knows how to test. `text` is for formulas and for what a program prints.
LANGUAGES = {"python", "yaml", "bash", "text"}
# What a comment in a yaml example says of its records, and such a record.
RECORDS = {
    '{"instruction": ..., "input": ..., "output": ...}': {"instruction": "Add.", "input": "1, 2", "output": "3"},
    '{"messages": [{"role": ..., "content": ...}, ...]}': {
        "messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}]
    },
}
MODULE_COMMAND = re.compile(r"(?:(?:\.venv/bin/)?python -m moe_peft\.|moe-peft )(\w+)(?: |$)")
# Of a run under way: the run that these tests have is complete, which the commands say once they have read their line.
OF_A_LIVE_RUN = {"submit", "stop"}
TINY_ANSWERS = ("--base", "base", "--max-new-tokens", "4")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        line: the number of its first line, behind the fence.
        language: what its fence names.
        text: without its indentation.
    """

    line: int
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    fence, language, start, body = "", "", 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        mark = re.match(r"\s*(`{3,}|~{3,})\s*([^`]*)$", line)
        if not fence and mark:
            fence, language, start, body = mark[1], mark[2].strip(), number + 1, []
        elif fence and line.strip() == fence:
            found.append(Block(start, language, textwrap.dedent("\n".join(body)) + "\n"))
            fence = ""
        else:
            body.append(line)
    assert not fence, f"{page.name}:{start - 1}: this block has no end"
    return found


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^\s*(`{3,}|~{3,}).*?^\s*\1$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def simple_commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a script that knows ``&&``, ``>``, comments and continued lines, no more."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            assert not re.fullmatch(r"[();<|&]+", word) or word == "&&", f"{word} in {line!r} is beyond this test"
            if word != "&&":
                words.append(word)
            elif words:
                yield words
                words = []


def pages(*languages: str) -> list[Path]:
    """The pages with a block in one of these languages."""
    found = [page for page in DOCS if any(block.language in languages for block in blocks_of(page))]
    assert found, f"no page has {languages}: this test finds nothing to test"
    return found


def write_data_of(example: str, folder: Path) -> None:
    """Write the data files that a yaml example names, with the records that its comments say they hold."""
    record: dict[str, object] = {}
    for line in example.splitlines():
        named = re.match(r"[\s-]*(eval_)?data:\s*([\w./-]+)\s*(?:#\s*(.*?) a line)?$", line)
        if named:
            assert named[1] or named[3] in RECORDS, f"{line!r} must say what a line of the file holds"
            record = RECORDS[named[3]] if named[3] else record
            tiny_run.write_jsonl(folder / named[2], [record] * 4)


def write_example(block: Block, folder: Path) -> None:
    """Make ``config.yaml`` of a yaml block, with its data beside it."""
    (folder / "config.yaml").write_text(block.text, encoding="utf-8")
    write_data_of(block.text, folder)


@pytest.fixture(scope="module")
def base_and_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny ``base``, and in ``runs/run-001`` a run on it: ``qa``, ``style``, ``orders``."""
    folder = tmp_path_factory.mktemp("base-and-run")
    base = tiny_run.make_base_folder(folder / "base")
    data = tiny_run.write_jsonl(folder / "data.jsonl", tiny_run.instructions(4))
    entries = [
        tiny_run.adapter_entry("qa", data, method="mixlora", num_experts=3, template="chat", max_steps=1),
        tiny_run.adapter_entry("style", data, template="chat", max_steps=1),
        tiny_run.adapter_entry("orders", data, template="chat", max_steps=1),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw", lambda self, runs: None)
        tiny_run.train(tiny_run.run_config(base, folder / "runs" / "run-001", *entries))
    return folder


class Shell:
    """Answers the commands of an example in a folder of its own.

    ``train`` reads its whole config, and stops before it trains; ``generate`` answers with a tiny base model.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def run(self, words: Sequence[str]) -> None:
        """Run one simple command of an example, or check what cannot be run inside a test."""
        line, words = " ".join(words), list(words)
        target = words.pop() if words[-2:-1] == [">"] else None
        if target is not None:
            words.pop()
        if module := MODULE_COMMAND.match(line):
            output = self._run_module(module[1], words[words.index("-m") + 2 if "-m" in words else 2 :])
            if target is not None:
                Path(target).write_text(output, encoding="utf-8")
        elif ".venv/bin/pip" in words:
            assert words[:4] == [".venv/bin/pip", "install", "-c", "constraints.txt"], line
            assert (ROOT / "constraints.txt").is_file()
            wanted = re.fullmatch(r"-e \.(?:\[(\w+)\])?", " ".join(words[4:]))
            assert wanted, line
            assert wanted[1] in [None, *(metadata("moe-peft-torch").get_all("Provides-Extra") or [])], line
        elif words[0] in (".venv/bin/python", "python") and words[1:3] == ["-m", "pytest"]:
            paths = words[5:] if words[3:4] == ["-n"] and words[4].isdecimal() else words[3:]
            assert all((ROOT / path).exists() for path in paths), line
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file(), line
        else:
            assert plain(words) in CI_COMMANDS, f"{line!r} is a command that neither this test nor .ci/run knows"

    def _run_module(self, name: str, arguments: list[str]) -> str:
        assert name in cli.COMMANDS
        if not arguments and name != "train":
            arguments = ["--help"]  # the command is only named
        if "--watch" in arguments:
            arguments.remove("--watch")  # which is for a terminal
        if name == "train" and "--help" not in arguments:
            arguments = [*arguments, "--print-config"]
        if name == "generate" and "--help" not in arguments:
            arguments = [*arguments, *TINY_ANSWERS]
        self._monkeypatch.setattr(sys, "stdin", StringIO("Hello?\n/quit\n"))
        code = command(name).main(arguments)
        out, errors = self._capsys.readouterr()
        if name in OF_A_LIVE_RUN and "--help" not in arguments:
            assert code != 0 and re.search("is complete|has ended", errors), f"{name} {arguments}: {errors}"
            return out
        assert (code, errors) == (0, ""), f"{name} {arguments}"
        assert out
        return out


def plain(words: Sequence[str]) -> str:
    """A command without what only tells it how much to say, or whether to change files."""
    line = " ".join(word for word in words if word not in ("--quiet", "--fix", "--check"))
    return line.replace(".venv/bin/python -m pip ", ".venv/bin/pip ")


CI_COMMANDS = [
    plain(shlex.split(line, comments=True)) for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
]


def command(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"moe_peft.{name}")


@pytest.fixture
def shell(
    base_and_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    """A fresh current folder with a base model, a run on it and prompts."""
    for name in ("base", "runs"):
        (tmp_path / name).symlink_to(base_and_run / name)
    original = json.loads((ROOT / "tests" / "config" / "fixtures" / "original.json").read_text())
    (tmp_path / "moe_peft.json").write_text(json.dumps(original["configs"]["lora"]["config"]), encoding="utf-8")
    config = yaml.safe_load((base_and_run / "runs" / "run-001" / "config.yaml").read_text(encoding="utf-8"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "output_dir": None}), encoding="utf-8")
    (tmp_path / "more.yaml").write_text(
        "adapters: [{name: extra, method: lora, data: bundled:orders}]", encoding="utf-8"
    )
    (tmp_path / "questions.jsonl").write_text('{"prompt": "What is a glacier?"}\n"And a lake?"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, capsys)


def run_process(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Python on these arguments in a folder, as a user would see it who has the base model in the cache."""
    smollm2_file()
    # On a busy machine every wait for a second thread costs more than it gains.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: no test runs a block of {block.language!r}"
        if block.language == "text":
            assert "moe_peft" not in block.text, f"{page.name}:{block.line}: an example in disguise"


@pytest.mark.slow
@pytest.mark.parametrize("page", pages("python"), ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """A page's blocks one after another, as one program whose line numbers are the page's."""
    lines: list[str] = []
    for block in blocks_of(page):
        if block.language == "python":
            lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    script = tmp_path / page.with_suffix(".py").name
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = run_process([str(script)], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("page", pages("yaml"), ids=lambda page: page.name)
def test_a_config_trains(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each config by the command that its page gives for it, shortened to a step.

    The README's in a process of its own on the real model, the others on a tiny one of as many layers.
    """
    tiny = tiny_run.make_base_folder(tmp_path / "tiny", num_hidden_layers=30, max_position_embeddings=512)
    monkeypatch.setattr(RunFolder, "draw", lambda self, runs: None)
    for number, block in enumerate(blocks_of(page)):
        if block.language != "yaml":
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        write_example(block, folder)
        config = TrainConfig.from_dict(yaml.safe_load(block.text))
        commands = (
            words[words.index("-m") :]
            for later in blocks_of(page)[number + 1 :]
            if later.language == "bash"
            for words in simple_commands(later.text)
            if "moe_peft.train" in words and "--print-config" not in words
        )
        argv = [
            *next(commands, ["-m", "moe_peft.train", "config.yaml"]),
            *("adapters.*.max_steps=1", "adapters.*.batch_size=2"),
        ]
        if page.name == "README.md":
            done = run_process(argv, folder)
            assert done.returncode == 0, done.stderr
        else:
            monkeypatch.chdir(folder)
            code = command("train").main([*argv[2:], f"base_model={tiny}"])
            assert code == 0, capsys.readouterr().err
        for job in config.adapters:
            assert (folder / "runs" / "run-001" / "adapters" / job.name / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", pages("bash"), ids=lambda page: page.name)
def test_commands_are_understood(page: Path, shell: Shell) -> None:
    """In the page's order, each config standing in the folder for the commands behind it."""
    for block in blocks_of(page):
        if block.language == "yaml":
            write_example(block, Path())
        if block.language == "bash":
            for words in simple_commands(block.text):
                shell.run(words)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_commands_in_the_prose_are_understood(page: Path, shell: Shell) -> None:
    for line in re.findall(r"`((?:[\w./]*python|moe-peft) [^`]+)`", " ".join(prose_of(page).split())):
        shell.run(shlex.split(re.sub(r"^moe-peft ", "python -m moe_peft.", line)))


def test_the_line_that_trains_from_python(shell: Shell) -> None:
    (line,) = re.findall(r"`(Trainer\(.*?\)\.train\(\))`", prose_of(ROOT / "README.md"))
    config = yaml.safe_load(Path("runs/run-001/config.yaml").read_text(encoding="utf-8"))
    Path("config.yaml").write_text(yaml.safe_dump({**config, "output_dir": "run"}), encoding="utf-8")
    result = eval(line, vars(moe_peft))
    assert [adapter.num_steps for adapter in result.adapters] == [1, 1, 1]


def test_the_second_set_up_command_is_what_ci_runs() -> None:
    readme = [list(simple_commands(block.text)) for block in blocks_of(ROOT / "README.md") if block.language == "bash"]
    first, second = [
        [plain(words) for words in block] for block in readme if ["python3", "-m", "venv", ".venv"] in block
    ]
    assert [line for line in CI_COMMANDS if line in second] == second
    assert CI_COMMANDS[-1] == second[-1] == ".venv/bin/python -m pytest -n 2"
    assert (first[0], first[-1]) == (second[0], ".venv/bin/python -m moe_peft.train")


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_and_named_files_lead_somewhere(page: Path) -> None:
    prose = prose_of(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"https?://", target):
            file, _, anchor = unquote(target).partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors_of(linked), target
    for name in re.findall(
        r"`([\w./-]+\.(?:py|md|txt|toml)|(?:moe_peft|kernels|tests|tools|docs|\.ci)/[\w./-]*)`", prose
    ):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "moe_peft")), name


def test_the_page_on_sweeps_names_the_members() -> None:
    blocks = {block.language: block.text for block in blocks_of(ROOT / "docs" / "sweeps.md")}
    config = TrainConfig.from_dict(yaml.safe_load(blocks["yaml"]))
    assert blocks["text"].split() == [job.name for job in config.adapters]


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ +(.*)$", prose_of(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_every_option_and_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = []
    monkeypatch.setattr(command(name), "run_command", lambda parser, *_: parsers.append(parser))
    command(name).main([])
    options = r"(?<![\w-])--[a-z]+(?:-[a-z]+)*"
    assert set(re.findall(options, parsers[0].format_help())) == {
        "--help",
        *re.findall(options, parsers[0].format_usage()),
    }


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_examples_in_help_are_understood(name: str, shell: Shell) -> None:
    examples = command(name).help_text().split("\nExamples:\n")[1]
    for words in simple_commands(examples):
        shell.run(words)
