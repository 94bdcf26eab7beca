"""A chat at the terminal: each line typed is answered as the next turn of the conversation."""

import contextlib
import sys
from collections.abc import Callable

from moe_peft.command.model import LoadedModel
from moe_peft.command.prompts import PromptForm, Question
from moe_peft.generation import generate_tokens, not_finite_message
from moe_peft.generation.request import Message, Request, context_tokens
from moe_peft.strict import nearest

BASE = "base"  # what the bare model is called at the terminal

COMMANDS = """\
  /adapter NAME   let another adapter answer from here on (base: the bare model); without NAME: list them
  /reset          forget the conversation
  /help           show this list
  /quit           leave, as Ctrl-D does; Ctrl-C stops an answer, and at the prompt leaves too"""


class Chat:
    """A conversation in progress.

    Args:
        loaded: the model and its tokenizer.
        adapter_name: who answers first.
        form_of: an adapter's name to the form of its prompts.
        new_request: makes a request of ``prompt_ids`` and ``adapter_name``.
        find_adapter: what the user calls an adapter to its name; raises ValueError on an unknown one.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        adapter_name: str,
        *,
        form_of: Callable[[str], PromptForm],
        new_request: Callable[..., Request],
        find_adapter: Callable[[str], str],
    ) -> None:
        self._loaded = loaded
        self._adapter_name = adapter_name
        self._form_of = form_of
        self._new_request = new_request
        self._find_adapter = find_adapter
        self._turns: list[tuple[Message, Message]] = []  # a user's and its answer

    def run(self) -> None:
        """Reads and answers until the user leaves."""
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (gives input() its line editing)
        print(COMMANDS)
        self._say_who()
        while True:
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.startswith("/"):
                if self._command(line) == "quit":
                    return
            elif line.strip():
                self._answer(line.strip())

    def _command(self, line: str) -> str:
        name, _, argument = line[1:].partition(" ")
        if name == "adapter":
            self._change_adapter(argument.strip())
        elif name == "reset":
            self._turns.clear()
            print("(the conversation begins anew)")
        elif name == "help":
            print(COMMANDS)
        elif name != "quit":
            hint = nearest(name, ("adapter", "reset", "help", "quit"))
            print(f"/{name} is no command{hint}; to say it to the model, begin the line with a space", file=sys.stderr)
        return name

    def _change_adapter(self, called: str) -> None:
        if not called:
            print("adapters: " + ", ".join([BASE, *self._loaded.model.adapter_names]))
            return
        try:
            name = self._find_adapter(called)
            self._form_of(name)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return
        self._adapter_name = name
        self._say_who()

    def _say_who(self) -> None:
        is_chat = self._form_of(self._adapter_name).is_chat
        memory = "" if is_chat else "; its prompts are no conversation, so each line stands alone"
        print(f"({self._adapter_name or BASE} answers{memory})")

    def _answer(self, text: str) -> None:
        pieces: list[str] = []

        def on_text(_: int, piece: str) -> None:
            pieces.append(piece)
            print(piece, end="", flush=True)

        try:
            request = self._request(text)
            completion = generate_tokens(self._loaded.model, self._loaded.tokenizer, [request], on_text=on_text)[0]
        except KeyboardInterrupt:
            print("\n(stopped)")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return
        else:
            print()
            if completion.finish_reason == "not_finite":
                print(f"error: {not_finite_message(self._adapter_name)}", file=sys.stderr)
                return
            if completion.finish_reason == "length":
                print(f"(cut off at {request.max_new_tokens} tokens)")
        if pieces:
            answer = {"role": "assistant", "content": "".join(pieces)}
            self._turns.append(({"role": "user", "content": text}, answer))

    def _request(self, text: str) -> Request:
        """The next turn behind as much of the conversation as the model has room for."""
        form, model = self._form_of(self._adapter_name), self._loaded.model
        limit, num_virtual = model.config_.context_limit, context_tokens(model, self._adapter_name)
        for forgotten in range(len(self._turns) + 1):
            messages = tuple(message for turn in self._turns[forgotten:] for message in turn) if form.is_chat else ()
            ids = form.prompt_ids(Question(instruction=text, messages=messages), self._loaded.tokenizer)
            request = self._new_request(prompt_ids=ids, adapter_name=self._adapter_name)
            if limit is None or num_virtual + len(ids) + request.max_new_tokens <= limit:
                if forgotten:
                    del self._turns[:forgotten]
                    print(f"(no room left for the oldest turns of the conversation: {forgotten} forgotten)")
                break
        return request  # where nothing made it fit, it is refused for its length
