"""``python -m moe_peft.generate``: answers prompts with a base model and its adapters."""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe_peft.command import EXIT_CODES, CommandParser, run_command
from moe_peft.command.chat import BASE, Chat
from moe_peft.command.model import MODEL_OPTIONS, LoadedModel, add_model_arguments, load_named_model
from moe_peft.command.prompts import PromptForm, Question, read_questions
from moe_peft.data.templates import CHAT, load_template
from moe_peft.generation import generate_tokens, not_finite_message
from moe_peft.generation.request import Completion, Request, check_adapter_name, check_request
from moe_peft.generation.sampling import Sampling
from moe_peft.model.batch import parse_expert_name
from moe_peft.strict import show
from moe_peft.training.errors import TrainingError

HELP = """Answers prompts with a base model and its adapters, all of them in one batch.

Usage:
  python -m moe_peft.generate --prompt TEXT [options]
  python -m moe_peft.generate --prompts-file FILE [options]
  echo TEXT | python -m moe_peft.generate [options]
  python -m moe_peft.generate --interactive [options]
  (moe-peft generate ... is the same command)

Who answers:
{model_options}
  --use NAME                an adapter, one expert of a mixture (moe.NAME.experts.0), or base, the bare model. May be
                            given several times: each answers every prompt. Default: all adapters, or else base

What is asked:
  --prompt TEXT             may be given several times
  --prompts-file FILE       one prompt a line; a .jsonl or .json file holds strings, or mappings with "prompt", with
                            "instruction" and "input", or with "messages"
  --interactive             a small chat with the first that --use names; /help there tells more

How a prompt is put to the model (by default as the run trained the adapter, and without a run as --chat where the
tokenizer has a chat template):
  --chat                    as a user's turn in the model's chat template
  --raw                     as it is: the model continues the text
  --template NAME           in a training template: alpaca, moe_peft, chat, or your own file
  --system TEXT             the system message of the chat

How it is answered:
  --max-new-tokens N        the longest answer, in tokens; default: 256
  --temperature T           0, the default, always takes the most probable token; 1 draws from the model's probabilities
  --top-k K                 draw among the K most probable tokens only; default 0: all
  --top-p P                 draw among the most probable tokens that together reach P; default 1: all
  --seed N                  of the draws; the same prompt, adapter and seed give the same answer. Default: 0
  --stop TEXT               end the answer before this text; may be given several times
  --batch-size N            the most answers computed at once; default: 16

  --json                    print one JSON object an answer: prompt, adapter, text, finish_reason, num_tokens
  --debug                   show the traceback of an error
  -h, --help                show this text

One prompt for one adapter is printed as it is written, and nothing but the answer goes to standard output. Several are
printed with their names.

{exit_codes}

Examples:
  python -m moe_peft.generate --prompt "Name three colours."
  python -m moe_peft.generate --run runs/run-001 --use base --use qa --prompt "What is a glacier?"
  python -m moe_peft.generate --adapter qa=runs/run-001/adapters/qa --interactive
  python -m moe_peft.generate --raw --temperature 0.8 --top-p 0.95 --seed 7 --prompt "Once upon a time"
  python -m moe_peft.generate --run runs/run-001 --prompts-file questions.jsonl --json > answers.jsonl
"""

Job = tuple[Question, Request]


def help_text() -> str:
    """The whole ``--help``."""
    return HELP.format(model_options=MODEL_OPTIONS, exit_codes=EXIT_CODES)


def prepare(arguments: argparse.Namespace) -> Callable[[], object]:
    """Reads the prompts, loads the model and its adapters; returns the answering itself."""
    sampling = Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
    )
    new_request = partial(
        Request, max_new_tokens=arguments.max_new_tokens, sampling=sampling, stop=tuple(arguments.stop)
    )
    new_request(prompt_ids=(0,))  # refuses bad settings before anything is loaded
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size} must be at least 1")
    questions = _questions(arguments)
    loaded = load_named_model(arguments)
    find_adapter = partial(_find_adapter, loaded)
    names = list(dict.fromkeys(map(find_adapter, arguments.use or loaded.model.adapter_names or [BASE])))
    form_of = partial(_prompt_form, arguments, loaded)
    forms = {name: form_of(name) for name in names}
    if arguments.interactive:
        return Chat(loaded, names[0], form_of=form_of, new_request=new_request, find_adapter=find_adapter).run
    jobs = []
    for question, (name, form) in itertools.product(questions, forms.items()):
        request = new_request(prompt_ids=form.prompt_ids(question, loaded.tokenizer), adapter_name=name)
        check_request(loaded.model, request)
        jobs.append((question, request))
    if arguments.json:
        return partial(_print_json, loaded, jobs, arguments.batch_size)
    if len(jobs) == 1:
        return partial(_stream, loaded, jobs[0][1])
    return partial(_print_labelled, loaded, jobs, arguments.batch_size)


def _questions(arguments: argparse.Namespace) -> list[Question]:
    sources = [bool(arguments.prompt), arguments.prompts_file is not None, arguments.interactive]
    if sum(sources) > 1:
        raise ValueError("--prompt, --prompts-file and --interactive exclude each other: give one of them")
    if arguments.interactive:
        if arguments.json:
            raise ValueError("--json is not for --interactive, which prints for a person")
        return []
    if arguments.prompts_file is not None:
        return read_questions(Path(arguments.prompts_file))
    prompts = arguments.prompt
    if not prompts:
        if sys.stdin.isatty():
            raise ValueError(
                "there is no prompt: give --prompt TEXT, --prompts-file FILE or --interactive, or pipe one in"
            )
        prompts = [sys.stdin.read().removesuffix("\n")]
    blank = next((prompt for prompt in prompts if not prompt.strip()), None)
    if blank is not None:
        raise ValueError(f"the prompt {show(blank)} is blank")
    return [Question(instruction=prompt) for prompt in prompts]


def _find_adapter(loaded: LoadedModel, called: str) -> str:
    name = "" if called == BASE and BASE not in loaded.model.adapter_names else called
    check_adapter_name(loaded.model, name)
    return name


def _prompt_form(arguments: argparse.Namespace, loaded: LoadedModel, adapter_name: str) -> PromptForm:
    expert = parse_expert_name(adapter_name)
    trained = loaded.templates.get(expert[0] if expert else adapter_name)
    template = arguments.template or trained or (CHAT if loaded.tokenizer.chat_template is not None else None)
    if arguments.raw:
        template = None
    return PromptForm(template=load_template(template) if template is not None else None, system=arguments.system)


def _stream(loaded: LoadedModel, request: Request) -> None:
    def on_text(_: int, piece: str) -> None:
        print(piece, end="", flush=True)

    completion = generate_tokens(loaded.model, loaded.tokenizer, [request], on_text=on_text)[0]
    if not completion.text.endswith("\n"):
        print()
    _refuse_broken([(request, completion)])


def _print_labelled(loaded: LoadedModel, jobs: Sequence[Job], batch_size: int) -> None:
    num_prompts = len({id(question) for question, _ in jobs})
    finished, number, last = [], 0, None
    for question, request, completion in _answers(loaded, jobs, batch_size):
        if question is not last:
            number, last = number + 1, question
            print(f"=== prompt {number} of {num_prompts}: {show(question.instruction)}")
        print(f"--- {request.adapter_name or BASE}:\n{completion.text.rstrip()}", flush=True)
        finished.append((request, completion))
    _refuse_broken(finished)


def _print_json(loaded: LoadedModel, jobs: Sequence[Job], batch_size: int) -> None:
    finished = []
    for question, request, completion in _answers(loaded, jobs, batch_size):
        row: dict[str, Any] = {
            "prompt": question.instruction,
            "adapter": request.adapter_name or BASE,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
        }
        print(json.dumps(row, ensure_ascii=False), flush=True)
        finished.append((request, completion))
    _refuse_broken(finished)


def _answers(
    loaded: LoadedModel, jobs: Sequence[Job], batch_size: int
) -> Iterator[tuple[Question, Request, Completion]]:
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        completions = generate_tokens(loaded.model, loaded.tokenizer, [request for _, request in batch])
        for (question, request), completion in zip(batch, completions, strict=True):
            yield question, request, completion


def _refuse_broken(finished: Sequence[tuple[Request, Completion]]) -> None:
    for request, completion in finished:
        if completion.finish_reason == "not_finite":
            raise TrainingError(not_finite_message(request.adapter_name))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser("python -m moe_peft.generate", help_text)
    add_model_arguments(parser)
    parser.add_argument("--use", action="append", default=[])
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--prompts-file")
    parser.add_argument("--interactive", action="store_true")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", dest="template", action="store_const", const=CHAT)
    form.add_argument("--raw", action="store_true")
    form.add_argument("--template")
    parser.add_argument("--system")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    return run_command(parser, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
