"""Twenty training steps of every method on the same real batches: speed beside plain LoRA, memory, and loss.

    python benchmarks/methods.py                                  every method of the registry on SmolLM2-135M
    python benchmarks/methods.py --methods lora dora vera         some of them
    python benchmarks/methods.py --data train.json --samples 16   on your own records

The methods share one frozen model and take turns, step by step; each trains its own adapter on the same batches. A
ratio is the median of the ratios to plain LoRA's step round by round, without the first two rounds. Peak memory,
weights included, is of a process that trains that method alone. The loss is the mean over the answers' tokens, of the
first step and of the last three.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from batches import TOKENIZER, describe_files, real_batches
from ours import AdapterSettings, TrainingStep, Variant
from peak_memory import peak_memory_gb
from presets import PRESETS, build_model
from rows import RESULTS, append_row
from timing import Spread, paired_ratio, take_turns

from moe_peft.adapters import METHODS
from moe_peft.command.memory import reuse_freed_memory
from moe_peft.data.tokenizer import load_tokenizer
from moe_peft.io.placement import parse_device, parse_dtype

UNCOUNTED = 2  # rounds in which products of new shapes are compiled
_BASELINE = "lora"
# A method that trains few numbers, or far from the output, needs larger steps: rates as its paper or PEFT's examples
# give them. All others learn at --lr.
LEARNING_RATES = {
    "ia3": 8e-3,
    "p_tuning": 1e-2,
    "prefix_tuning": 1e-2,
    "prompt_tuning": 3e-2,
    "vera": 4e-3,
}


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and append a row a method."""
    options = parse(arguments)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    if options.only_memory:
        print(json.dumps({"peak_memory_gb": measured_memory(options)}))
        return
    memory = {method: None if options.no_memory else memory_of(arguments, method) for method in options.methods}
    reuse_freed_memory(len(options.methods))
    steps = prepare(options)
    losses: dict[str, list[float]] = {method: [] for method in steps}

    def take(method: str, number: int) -> float:
        seconds = steps[method](number)
        losses[method] += steps[method].losses
        return seconds

    actions = {method: lambda number, method=method: take(method, number) for method in steps}
    taken = {method: times[UNCOUNTED:] for method, times in take_turns(actions, rounds=options.steps, warmup=0).items()}
    for method, step in steps.items():
        counted = [step.tokens_of(number) for number in range(UNCOUNTED, options.steps)]
        speeds = [count / seconds for count, seconds in zip(counted, taken[method], strict=True)]
        row = {
            **settings_row(options, method),
            "trainable": step.num_trainable,
            "tokens_per_second": Spread.of(speeds).row(),
            "ratio": paired_ratio(taken[method], taken[_BASELINE]).row(),
            "first_loss": round(losses[method][0], 4),
            "last_loss": round(statistics.mean(losses[method][-3:]), 4),
            "peak_memory_gb": memory[method],
        }
        append_row("methods", row, folder=options.results, device=options.device)
        print(summary(row), flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with dtype and device as what they mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument("--preset", default="smollm2-135m", help=f"{', '.join(PRESETS)}; or a model folder")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--rank", type=int, default=8, help="of methods whose default is LoRA's (default: 8)")
    parser.add_argument("--lr", type=float, default=5e-4, help="of most methods (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of every method (default: %(default)s)")
    parser.add_argument("--data", nargs="+", default=["bundled:orders"], metavar="FILE", help="records to train on")
    parser.add_argument("--template", default="alpaca", help="of records with an instruction (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out: faster")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the rows")
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.dtype = parse_dtype(options.dtype) or torch.float32
        options.device = parse_device(options.device)
        if options.steps <= UNCOUNTED:
            raise ValueError(f"steps={options.steps} must be above {UNCOUNTED}, which do not count")
    except ValueError as error:
        parser.error(str(error))
    if _BASELINE not in options.methods and not options.only_memory:
        options.methods.insert(0, _BASELINE)
    return options


def prepare(options: argparse.Namespace) -> dict[str, TrainingStep]:
    """Each method's training, all on one model."""
    model = build_model(options.preset, options.dtype, options.device)
    batches = real_batches(
        options.data, options.samples, model.config_.vocab_size, count=options.steps, template=options.template
    )
    settings, tokenizer = AdapterSettings(r=options.rank), load_tokenizer(TOKENIZER)
    return {
        method: TrainingStep(
            model,
            Variant(label=method, method=method, num_adapters=1),
            settings,
            batches,
            config=None if _follows_lora(method) else METHODS[method](),
            num_steps=options.steps,
            lr=LEARNING_RATES.get(method, options.lr),
            tokenizer=tokenizer,
        )
        for method in options.methods
    }


def _follows_lora(method: str) -> bool:
    """Whether the method's rank is meant as plain LoRA's is: others have defaults of another size for a reason."""
    return issubclass(METHODS[method], METHODS[_BASELINE])


def memory_of(arguments: Sequence[str], method: str) -> float:
    """A method's peak memory in GB, from a process that trains nothing else."""
    command = [sys.executable, __file__, *arguments, "--only-memory", "--methods", method]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_memory_gb"])


def measured_memory(options: argparse.Namespace) -> float:
    """This process' peak over the steps with the most tokens."""
    reuse_freed_memory(len(options.methods))
    (step,) = prepare(options).values()
    for number in sorted(range(options.steps), key=step.tokens_of)[-2:]:
        step(number)
    on_gpu = options.device.type == "cuda"
    return round(torch.cuda.max_memory_allocated(options.device) / 1e9 if on_gpu else peak_memory_gb(), 3)


def settings_row(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Everything that was asked for, and the case's name."""
    dtype = str(options.dtype).removeprefix("torch.")
    preset = options.preset if options.preset in PRESETS else Path(options.preset).name
    data = describe_files(options.data)
    return {
        "case": f"{preset}, {dtype}, {options.device.type}, {options.samples} of {', '.join(data)}: {method}",
        "preset": preset,
        "dtype": dtype,
        "method": method,
        "compared": options.methods,
        "samples": options.samples,
        "data": data,
        "template": options.template,
        "rank": options.rank if _follows_lora(method) else None,
        "lr": LEARNING_RATES.get(method, options.lr),
        "steps": options.steps,
        "ratio_to": _BASELINE,
    }


def summary(row: dict[str, Any]) -> str:
    """A method's row for people."""
    memory = "" if row["peak_memory_gb"] is None else f"   {row['peak_memory_gb']:.2f} GB"
    return (
        f"{row['method']:<18} {row['trainable']:>10,} parameters   tokens/s {Spread(**row['tokens_per_second'])}   "
        f"time / {_BASELINE} {Spread(**row['ratio'])}   loss {row['first_loss']:.3f} to {row['last_loss']:.3f}{memory}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
