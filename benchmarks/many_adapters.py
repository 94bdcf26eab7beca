"""Many adapters on the same tokens: fused, one after another, and one after another with the real peft.

    python benchmarks/many_adapters.py                              1 to 16 LoRA adapters, short samples: 5 minutes
    python benchmarks/many_adapters.py --method mixlora --no-peft
    python benchmarks/many_adapters.py --adapters 1 8 --longest 256

A round is the same for everybody: every adapter of the largest N takes one step of its own few samples. With N adapters
fused, N of these steps share a forward; one after another (N = 1, and peft) each has a forward of its own. So all sides
see the same tokens in a round and take equally many steps on each sample. Every side is a process of its own; they take
turns, a round here, a round there, and the others sleep. peft's samples are padded to the longest of their batch, and
the fastest of its ways to run is compared. One row holds all sides.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from batches import Batch
from export import WITHOUT_WEIGHTS, export_preset
from peer_process import OUR_PYTHON, Worker, installed_versions, peer_python
from peers import PACKAGES, check_losses, probe
from presets import PRESETS
from rows import RESULTS, append_row
from timing import Spread, paired_ratio, take_turns

from moe_peft.adapters import METHODS
from moe_peft.data.samples import Sample
from moe_peft.io.hf_config import read_llama_config
from moe_peft.io.placement import parse_device

PEFT_MODES = {"bfloat16": ("bfloat16", "autocast", "bfloat16+autocast"), "float32": ("float32",)}


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and leave a row."""
    options = parse(arguments)
    torch.set_num_threads(options.num_threads)  # for the row: this process computes nothing
    options.cache.mkdir(parents=True, exist_ok=True)
    row = measure(export_preset(options.preset, options.cache / f"model-{options.preset}"), options)
    print(summary(row), flush=True)
    append_row("many_adapters", row, folder=options.results, device=options.device)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="(%(default)s)")
    parser.add_argument("--method", choices=METHODS, default="lora", help="of every adapter (%(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="of one adapter's step (%(default)s)")
    parser.add_argument("--shortest", type=int, default=16, help="tokens of a sample, at least (%(default)s)")
    parser.add_argument("--longest", type=int, default=64, help="tokens of a sample, at most (%(default)s)")
    parser.add_argument("--preset", choices=PRESETS, default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--dtype", choices=PEFT_MODES, default="bfloat16", help="of the frozen weights (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--experts", type=int, default=8, help="of a mixture (%(default)s)")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token goes to (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (%(default)s)")
    parser.add_argument("--no-peft", action="store_true", help="leave peft out; it knows no mixtures")
    parser.add_argument("--python-peft", help="an interpreter that has peft, instead of an environment made for it")
    parser.add_argument("--num-threads", type=int, default=torch.get_num_threads(), help="(torch's choice)")
    parser.add_argument("--cache", type=Path, default=Path("runs/peers"), help="environments and models (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the rows")
    options = parser.parse_args(arguments)
    options.adapters = sorted(set(options.adapters))
    try:
        options.device = parse_device(options.device)
        if options.adapters[0] != 1:
            raise ValueError(f"adapters={options.adapters} must hold 1, which is one adapter after another")
        odd = [number for number in options.adapters if number < 1 or options.adapters[-1] % number]
        if odd:
            raise ValueError(
                f"adapters={odd} must divide the largest, {options.adapters[-1]}: a round is of whole forwards"
            )
        if not 2 <= options.shortest <= options.longest:
            raise ValueError(f"shortest={options.shortest} must be in 2..longest={options.longest}")
        if options.method != "lora" and not options.no_peft:
            raise ValueError(f"method={options.method!r} is not peft's: say --no-peft")
    except ValueError as error:
        parser.error(str(error))
    return options


def measure(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of every side in turns."""
    largest = options.adapters[-1]
    samples = make_samples(largest * options.samples, options, read_llama_config(model).vocab_size)
    settings = {
        "model": str(model.absolute()),
        "device": str(options.device),
        **{key: getattr(options, key) for key in ("rank", "experts", "top_k", "dropout", "num_threads")},
    }

    def start(peer: str, python: str, mode: str, num_adapters: int) -> Worker:
        path = options.cache / f"many-{num_adapters}.json"
        batches = cut(samples, num_adapters * options.samples)
        plain = [[{"input_ids": s.input_ids, "labels": s.labels} for s in batch.samples] for batch in batches]
        path.write_text(json.dumps(plain), encoding="utf-8")
        variant = options.method if num_adapters == 1 else f"{num_adapters}x{options.method}"
        given = {**settings, "batches": str(path.absolute()), "variant": variant, "mode": mode}
        return Worker(peer, python, given, options.cache / f"{peer}-{num_adapters}.log")

    probed: dict[str, float] = {}
    sides: dict[str, Callable[[], Worker]] = {
        str(number): partial(start, "ours", OUR_PYTHON, options.dtype, number) for number in options.adapters
    }
    if not options.no_peft:
        python = options.python_peft or peer_python("peft", options.cache.absolute())
        probed = probe(PEFT_MODES[options.dtype], lambda mode: start("peft", python, mode, 1))
        sides["peft"] = partial(start, "peft", python, min(probed, key=lambda mode: probed[mode]), 1)
    with ExitStack() as stack:
        workers = {side: stack.enter_context(begin()) for side, begin in sides.items()}
        forwards = {side: largest // (1 if side == "peft" else int(side)) for side in sides}
        rounds = {side: partial(take_round, workers[side], forwards[side]) for side in sides}
        taken = take_turns(rounds, rounds=options.rounds, warmup=options.warmup)
    if not options.no_peft:
        check_losses(workers["1"].losses[0], workers["peft"].losses[0], options.preset)
    tokens = sum(len(sample.input_ids) for sample in samples)
    figures = {side: side_row(workers[side], taken[side], tokens) for side in sides}
    for side in sides:
        figures[side]["ratio"] = paired_ratio(taken["1"], taken[side]).row()  # to ours one after another
        if not options.no_peft:
            figures[side]["ratio_to_peft"] = paired_ratio(taken["peft"], taken[side]).row()
    return {
        **settings_row(options, tokens),
        "probed_seconds": probed,
        "peer_versions": {} if options.no_peft else installed_versions(python, PACKAGES),
        "fused": {side: figures[side] for side in sides if side != "peft"},
        "peft": figures.get("peft"),
    }


def make_samples(count: int, options: argparse.Namespace, vocab_size: int) -> list[Sample]:
    """Random tokens, all supervised, of lengths drawn evenly."""
    draw = random.Random(0)
    lengths = [draw.randint(options.shortest, options.longest) for _ in range(count)]
    ids = [tuple(draw.randrange(vocab_size) for _ in range(length)) for length in lengths]
    return [Sample(row, row) for row in ids]


def cut(samples: Sequence[Sample], size: int) -> list[Batch]:
    """Batches of so many samples, in order."""
    return [Batch(tuple(samples[start : start + size])) for start in range(0, len(samples), size)]


def take_round(worker: Worker, num_forwards: int, number: int) -> float:
    """Seconds of one round of a side."""
    return sum(worker(number * num_forwards + i) for i in range(num_forwards))


def side_row(worker: Worker, seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    """One side's figures, over all rounds."""
    return {
        "seconds": Spread.of(seconds).row(),
        "tokens_per_second": Spread.of([tokens / time for time in seconds]).row(),
        "peak_memory_gb": round(worker.peak_memory_gb, 3),
        **worker.environment,
    }


def settings_row(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Everything that was asked for, and the case's name."""
    shape = f"{options.samples} samples of {options.shortest} to {options.longest} tokens a step"
    weights = "random weights" if options.preset in WITHOUT_WEIGHTS else None
    what = [options.preset, weights, options.dtype, options.device.type, f"{options.method} r{options.rank}", shape]
    keys = ("method", "preset", "dtype", "samples", "shortest", "longest", "rank", "experts", "top_k", "dropout")
    return {
        "case": ", ".join(filter(None, what)),
        "adapters": options.adapters,
        **{key: getattr(options, key) for key in (*keys, "rounds", "warmup")},
        "tokens": tokens,
    }


def summary(row: dict[str, Any]) -> str:
    """A row for people."""
    lines = [f"{row['case']}; {row['tokens']:,} tokens a round"]
    for number, figures in row["fused"].items():
        lines.append(f"  ours, {number:>2} fused  {_speed(figures)}  {Spread(**figures['ratio'])} x one after another")
    if row["peft"] is not None:
        ratio = Spread(**list(row["fused"].values())[-1]["ratio_to_peft"])
        lines.append(f"  peft, one by one {_speed(row['peft'])}; ours with the most fused is {ratio} x as fast")
    return "\n".join(lines)


def _speed(figures: dict[str, Any]) -> str:
    return f"{Spread(**figures['tokens_per_second'])} tokens/s, {figures['peak_memory_gb']:.2f} GB"


if __name__ == "__main__":
    main(sys.argv[1:])
