"""Ours beside the real peft on transformers, and beside the original: the same batches, in turns.

    python benchmarks/peers.py                                       every case on uniform lengths: about 15 minutes
    python benchmarks/peers.py --cases peft-lora-bf16 original-mixlora-best
    python benchmarks/peers.py --cases peft-real-bf16 --data arc/train.json boolq/train.json
    python benchmarks/peers.py --preset tinyllama-1.1b --device cuda --tokens 16384 --rank 16 --cases peft-lora-bf16

The original is PyPI's moe-peft 2.0.2, unmodified. Each side is a process of its own, in an environment of its own: the
peers' are made on first use under --cache, with pinned versions. The steps take turns, one here, one there, while the
other process sleeps; both get the same weights and the same token ids, ours without padding, the peers padded to their
longest sample as their users do it. Where a peer can run in several ways (bf16 weights, autocast, both), each is tried
first and the fastest is the one that is compared. All adapters start as the base model, so the first losses must agree,
or there is no result. A ratio is the peer's seconds over ours, step by step; memory is each process' own peak.

The cases: {cases}

The smoke test runs ours beside peft on a tiny model. The original needs an environment that tests do not make (its
transformers is four years behind), so of its worker they check the arguments alone.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from batches import Batch, describe_files, real_batches, uniform_batches
from export import WITHOUT_WEIGHTS, export_preset
from peer_process import OUR_PYTHON, Worker, installed_versions, peer_python
from presets import PRESETS
from rows import RESULTS, append_row
from timing import Spread, paired_ratio, take_turns

from moe_peft.io.hf_config import read_llama_config
from moe_peft.io.placement import parse_device

PACKAGES = ("torch", "transformers", "peft", "moe-peft", "moe_peft")
_PROBE_STEPS = 2
# The first losses differ by rounding alone; bf16 keeps 8 bits, and the losses are means over many tokens.
_LOSS_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Args:
        peer: ``peft`` or ``original``.
        variant: what both train.
        dtype: of our frozen weights.
        modes: the peer's ways to run, of which the fastest counts.
        is_real: on real records instead of uniform lengths.
    """

    peer: str
    variant: str
    dtype: str
    modes: tuple[str, ...]
    is_real: bool = False


_PEFT_BF16 = ("bfloat16", "autocast", "bfloat16+autocast")
_ORIGINAL = ("float32", "bfloat16")
CASES = {
    "peft-lora-bf16": Case(peer="peft", variant="lora", dtype="bfloat16", modes=_PEFT_BF16),
    "peft-lora-fp32": Case(peer="peft", variant="lora", dtype="float32", modes=("float32",)),
    "original-lora-fp32": Case(peer="original", variant="lora", dtype="float32", modes=("float32",)),
    "original-mixlora-fp32": Case(peer="original", variant="mixlora", dtype="float32", modes=("float32",)),
    "original-mixlora-best": Case(peer="original", variant="mixlora", dtype="bfloat16", modes=_ORIGINAL),
    "original-4xmixlora-best": Case(peer="original", variant="4xmixlora", dtype="bfloat16", modes=_ORIGINAL),
    "peft-real-bf16": Case(peer="peft", variant="lora", dtype="bfloat16", modes=_PEFT_BF16, is_real=True),
}


def main(arguments: Sequence[str]) -> None:
    """Run the cases one by one, each to its row."""
    options = parse(arguments)
    torch.set_num_threads(options.num_threads)  # for the rows: this process computes nothing while others do
    options.cache.mkdir(parents=True, exist_ok=True)
    model = export_preset(options.preset, options.cache / f"model-{options.preset}")
    for name in options.cases:
        row = run_case(name, CASES[name], model, options)
        print(summary(row), flush=True)
        append_row("peers", row, folder=options.results, device=options.device)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    about = (__doc__ or "").replace("{cases}", ", ".join(CASES))
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    uniform = [name for name, case in CASES.items() if not case.is_real]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=uniform, metavar="CASE", help="(default: uniform)")
    parser.add_argument("--preset", choices=PRESETS, default="smollm2-135m", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="a step, uniform cases (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="a step (default: %(default)s)")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="records of the real cases; a batch is of one file, they take turns (default: the bundled tasks)",
    )
    parser.add_argument("--template", default="alpaca", help="of real records (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--experts", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of every side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="before them (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=torch.get_num_threads(), help="(default: torch's choice)")
    parser.add_argument(
        "--no-turns", action="store_true", help="one side after the other, for a GPU that cannot hold both"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/peers"), help="environments and models (%(default)s)")
    parser.add_argument("--python-peft", help="an interpreter that has peft, instead of an environment made for it")
    parser.add_argument("--python-original", help="the same for the original")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the rows")
    options = parser.parse_args(arguments)
    try:
        options.device = parse_device(options.device)
        originals = [name for name in options.cases if CASES[name].peer == "original"]
        if originals and (options.device.type != "cpu" or options.preset in WITHOUT_WEIGHTS):
            raise ValueError(f"cases={' '.join(originals)}: the original runs on the cpu, and from weights in a file")
        if options.data and not any(CASES[name].is_real for name in options.cases):
            raise ValueError("data is for the real cases")
    except ValueError as error:
        parser.error(str(error))
    return options


def run_case(name: str, case: Case, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns.

    Raises:
        RuntimeError: when a side dies, or when the two do not compute the same loss.
    """
    python = getattr(options, f"python_{case.peer}") or peer_python(case.peer, options.cache.absolute())
    batches = make_batches(case, model, options)
    batch_file = options.cache / "batches.json"
    rows = [[{"input_ids": s.input_ids, "labels": s.labels} for s in batch.samples] for batch in batches]
    batch_file.write_text(json.dumps(rows), encoding="utf-8")
    settings = {
        "model": str(model.absolute()),
        "batches": str(batch_file.absolute()),
        "device": str(options.device),
        "variant": case.variant,
        **{key: getattr(options, key) for key in ("rank", "experts", "top_k", "dropout", "num_threads")},
    }

    def start(peer: str, interpreter: str, mode: str) -> Worker:
        return Worker(peer, interpreter, {**settings, "mode": mode}, options.cache / f"{peer}.log")

    probed = probe(case.modes, partial(start, case.peer, python))
    mode = min(probed, key=lambda mode: probed[mode])
    taken: dict[str, list[float]] = {}
    with ExitStack() as stack:
        starts = {
            "ours": partial(start, "ours", OUR_PYTHON, case.dtype),
            "theirs": partial(start, case.peer, python, mode),
        }
        workers: dict[str, Worker] = {}
        for groups in [[side] for side in starts] if options.no_turns else [list(starts)]:
            current = {side: stack.enter_context(starts[side]()) for side in groups}
            taken |= take_turns(current, rounds=options.steps, warmup=options.warmup)
            workers |= current
            if options.no_turns:
                stack.close()
    check_losses(workers["ours"].losses[0], workers["theirs"].losses[0], options.preset)
    counted = [batches[number % len(batches)] for number in range(options.warmup, options.warmup + options.steps)]
    return {
        **settings_row(name, case, options),
        "mode": mode,
        "probed_seconds": probed,
        "peer_versions": installed_versions(python, PACKAGES),
        "ours": side_row(workers["ours"], taken["ours"], counted),
        "theirs": side_row(workers["theirs"], taken["theirs"], counted),
        "ratio": paired_ratio(taken["theirs"], taken["ours"]).row(),
    }


def make_batches(case: Case, model: Path, options: argparse.Namespace) -> list[Batch]:
    """What both sides train on."""
    vocab = read_llama_config(model).vocab_size
    if case.is_real:
        count = options.warmup + options.steps
        return real_batches(options.data, options.samples, vocab, count=count, template=options.template)
    return uniform_batches(options.tokens, options.samples, vocab)


def probe(modes: Sequence[str], start: Any) -> dict[str, float]:
    """Seconds of the best of a few steps in each of a peer's modes; nothing is run where there is no choice."""
    if len(modes) == 1:
        return {modes[0]: 0.0}
    best = {}
    for mode in modes:
        with start(mode) as worker:
            worker(0)
            best[mode] = round(min(worker(number) for number in range(1, 1 + _PROBE_STEPS)), 3)
            print(f"  tried {mode}: {best[mode]} s a step", flush=True)
    return best


def check_losses(ours: Sequence[float], theirs: Sequence[float], preset: str) -> None:
    """Refuse a comparison of two sides that do not compute the same."""
    if preset in WITHOUT_WEIGHTS:
        return  # each side has drawn its own
    for mine, other in zip(ours, theirs, strict=True):
        if not abs(mine - other) <= _LOSS_TOLERANCE * abs(other):
            raise RuntimeError(f"the first losses differ: ours {list(ours)}, theirs {list(theirs)}")


def side_row(worker: Worker, seconds: Sequence[float], counted: Sequence[Batch]) -> dict[str, Any]:
    """One side's figures."""
    tokens = [batch.num_tokens / time for batch, time in zip(counted, seconds, strict=True)]
    supervised = [batch.num_supervised / time for batch, time in zip(counted, seconds, strict=True)]
    return {
        "seconds": Spread.of(seconds).row(),
        "tokens_per_second": Spread.of(tokens).row(),
        "supervised_per_second": Spread.of(supervised).row(),
        "peak_memory_gb": round(worker.peak_memory_gb, 3),
        "first_loss": round(sum(worker.losses[0]) / len(worker.losses[0]), 4),
        **worker.environment,
    }


def settings_row(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, and the case's name."""
    shape = f"{options.samples} real" if case.is_real else f"{options.samples}x{options.tokens // options.samples}"
    what = [options.preset, options.device.type, shape, f"r{options.rank}"]
    what += [f"dropout {options.dropout:g}"] if options.dropout else []
    what += describe_files(options.data) if case.is_real else []
    return {
        "case": f"{name}: {', '.join(what)}",
        "name": name,
        "preset": options.preset,
        "peer": case.peer,
        "variant": case.variant,
        "dtype": case.dtype,
        "samples": options.samples,
        "tokens": None if case.is_real else options.tokens,
        "data": describe_files(options.data) if case.is_real else None,
        "template": options.template if case.is_real else None,
        "rank": options.rank,
        "experts": options.experts,
        "top_k": options.top_k,
        "dropout": options.dropout,
        "steps": options.steps,
        "warmup": options.warmup,
        "turns": not options.no_turns,
    }


def summary(row: dict[str, Any]) -> str:
    """A row for people."""
    lines = [row["case"]]
    for side, name in (("ours", f"ours, {row['dtype']}"), ("theirs", f"{row['peer']}, {row['mode']}")):
        speed = Spread(**row[side]["tokens_per_second"])
        lines.append(f"  {name:<28} {speed} tokens/s, {row[side]['peak_memory_gb']:.2f} GB")
    return "\n".join([*lines, f"  {'ours is faster by':<28} {Spread(**row['ratio'])}"])


if __name__ == "__main__":
    main(sys.argv[1:])
