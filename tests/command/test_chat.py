"""The chat at the terminal: what the model sees of the conversation, and what each command does."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
from builders import add_random_adapter
from tiny_run import make_base_folder

from moe_peft import LoraConfig, load_base_model, load_tokenizer
from moe_peft.command import chat as chat_module
from moe_peft.command.chat import Chat
from moe_peft.command.model import LoadedModel
from moe_peft.command.prompts import PromptForm
from moe_peft.data.templates import load_template
from moe_peft.generation import generate_tokens
from moe_peft.generation.request import Request, check_adapter_name


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make_base_folder(tmp_path_factory.mktemp("base"))
    model = load_base_model(folder, device="cpu")
    add_random_adapter(model, "qa", LoraConfig(r=2))
    return LoadedModel(model=model, tokenizer=load_tokenizer(folder), templates={})


class Session:
    """A chat in which the lines are typed beforehand; an exception is what the terminal raises then.

    Args:
        stop_after: Ctrl-C comes with this piece of every answer.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        monkeypatch: pytest.MonkeyPatch,
        *,
        form: PromptForm | None = None,
        max_new_tokens: int = 6,
        stop_after: int | None = None,
    ) -> None:
        self.loaded, self.monkeypatch, self.stop_after = loaded, monkeypatch, stop_after
        self.prompts: list[tuple[str, str]] = []  # who was asked, and the text the model saw
        self.answers: list[str] = []
        monkeypatch.setattr(chat_module, "generate_tokens", self.generate)
        form = form or PromptForm(template=load_template("chat"))
        self.chat = Chat(
            loaded,
            "",
            form_of=lambda name: form,
            new_request=partial(Request, max_new_tokens=max_new_tokens),
            find_adapter=self.find,
        )

    def find(self, called: str) -> str:
        name = called.replace("base", "")
        check_adapter_name(self.loaded.model, name)
        return name

    def generate(self, model, tokenizer, requests: Sequence[Request], *, on_text: Callable[[int, str], None]):
        self.prompts.append((requests[0].adapter_name, tokenizer.decode(requests[0].prompt_ids, False)))
        pieces: list[str] = []

        def pass_on(index: int, piece: str) -> None:
            on_text(index, piece)
            pieces.append(piece)
            if len(pieces) == self.stop_after:
                raise KeyboardInterrupt

        try:
            return generate_tokens(model, tokenizer, requests, on_text=pass_on)
        finally:
            self.answers.append("".join(pieces))

    def type(self, *lines: str | BaseException) -> None:
        rest = iter(lines)

        def typed(_: str) -> str:
            line = next(rest)
            if isinstance(line, BaseException):
                raise line
            return line

        self.monkeypatch.setattr("builtins.input", typed)
        self.chat.run()
        assert next(rest, None) is None, "the chat ended early"


def turn(role: str, text: str) -> str:
    return f"<turn>{role}\n{text}</s>"


def test_every_turn_sees_those_before_it(loaded, monkeypatch, capsys) -> None:
    session = Session(loaded, monkeypatch)
    session.type("Hello", "", "  And now?  ", "/reset", "Again", "/quit")
    first, second, third = (prompt for _, prompt in session.prompts)
    assert first == turn("user", "Hello") + "<turn>assistant\n"
    earlier = turn("user", "Hello") + turn("assistant", session.answers[0])
    assert second == earlier + turn("user", "And now?") + "<turn>assistant\n"
    assert third == turn("user", "Again") + "<turn>assistant\n"
    out, err = capsys.readouterr()
    assert err == ""
    assert all(answer in out for answer in session.answers)
    assert out.count("(cut off at 6 tokens)") == 3


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt(), "/quit"])
def test_the_ways_out(loaded, monkeypatch, capsys, end) -> None:
    Session(loaded, monkeypatch).type(end)
    assert capsys.readouterr().err == ""


def test_another_adapter_takes_the_conversation_over(loaded, monkeypatch, capsys) -> None:
    session = Session(loaded, monkeypatch)
    session.type("Hello", "/adapter qa", "Hello", "/adapter", "/adapter qb", "Hello", "/adapter base", "Hello", "/quit")
    assert [name for name, _ in session.prompts] == ["", "qa", "qa", ""]
    assert session.answers[0] in session.prompts[1][1]
    out, err = capsys.readouterr()
    assert "(base answers)" in out
    assert "(qa answers)" in out
    assert "adapters: base, qa\n" in out
    assert err == "error: adapter 'qb' is not attached to this model; valid here: qa\n"


def test_help_and_what_is_no_command(loaded, monkeypatch, capsys) -> None:
    session = Session(loaded, monkeypatch)
    session.type("/help", "/rest", " /etc/hosts is a file", "/quit")
    out, err = capsys.readouterr()
    assert out.count("/adapter NAME") == 2
    assert "/rest is no command; did you mean 'reset'?" in err
    assert turn("user", "/etc/hosts is a file") in session.prompts[0][1]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(loaded, monkeypatch, capsys) -> None:
    session = Session(loaded, monkeypatch, stop_after=2, max_new_tokens=40)
    session.type("Hello", "Go on", "/quit")
    assert turn("assistant", session.answers[0]) in session.prompts[1][1]
    assert capsys.readouterr().out.count("(stopped)") == 2


def test_the_oldest_turns_make_room(loaded, monkeypatch, capsys) -> None:
    limit = loaded.model.config_.max_position_embeddings
    session = Session(loaded, monkeypatch, max_new_tokens=24)
    session.type(*(f"Line {i}" for i in range(6)), "x" * limit, "Short", "/quit")
    prompts = [prompt for _, prompt in session.prompts]
    assert "Line 0" in prompts[1]
    assert "Line 0" not in prompts[5]
    assert "Line 4" in prompts[5]
    out, err = capsys.readouterr()
    assert "forgotten)" in out
    assert "must come to at most" in err  # the line that no forgetting could make fit
    # That line is not in the conversation, and cost it nothing.
    assert prompts[-1].endswith(turn("assistant", session.answers[5]) + turn("user", "Short") + "<turn>assistant\n")


def test_without_a_chat_template_each_line_stands_alone(loaded, monkeypatch, capsys) -> None:
    session = Session(loaded, monkeypatch, form=PromptForm(template=None))
    session.type("Hello", "And now?", "/quit")
    assert [prompt for _, prompt in session.prompts] == ["Hello", "And now?"]
    assert "each line stands alone" in capsys.readouterr().out
