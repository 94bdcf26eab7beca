"""One training step: how fast, how much memory, and how near the machine's own limit.

    python benchmarks/step.py                                     LoRA on SmolLM2-135M, 8 samples of 256 tokens
    python benchmarks/step.py --compare lora mixlora 4xmixlora    what a mixture costs, and four at once
    python benchmarks/step.py --lengths real --data train.json    lengths and answers of your own records
    python benchmarks/step.py --preset llama-7b --device cuda --tokens 16384 --rank 16 --compare lora mixlora

A step is what the train command does: forward, backward, clipping, AdamW. The variants of --compare share one frozen
model and take turns, step by step, so that a machine that slows down slows all of them; a ratio is the median of the
ratios round by round. Between them the necessary products with the frozen weights run alone (each projection's x W^T
and dy W at its real shape, the head on rows with a label): gemm_share is their time over the step's, 1.0 could not be
beaten with these weights in this dtype. On a GPU that is known, MFU is the step's FLOPs over those of the data sheet.
Peak memory, weights included, is taken first, of each variant in a process of its own: resident memory on a CPU, the
allocator's on a GPU.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from batches import Batch, describe_files, real_batches, uniform_batches
from ours import AdapterSettings, TrainingStep, Variant, parse_variant
from peak_memory import peak_memory_gb
from presets import PRESETS, build_model
from roofline import BaseGemms, peak_flops, step_flops
from rows import RESULTS, append_row
from timing import Spread, paired_ratio, take_turns

from moe_peft.command.memory import reuse_freed_memory
from moe_peft.io.placement import parse_device, parse_dtype
from moe_peft.model.llama import LlamaForCausalLM

_GEMMS = "base GEMMs"
_MEMORY_STEPS = 3  # the third takes no more than the second


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and append one row a variant."""
    options = parse(arguments)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    if options.only_memory:
        print(json.dumps({"peak_memory_gb": measured_memory(options)}))
        return
    memory = {variant.label: memory_of(arguments, variant) for variant in options.variants}
    reuse_freed_memory(sum(variant.num_adapters for variant in options.variants))
    model, batches, steps = prepare(options)
    gemms = BaseGemms(model, batches)
    taken = take_turns({**steps, _GEMMS: gemms}, rounds=options.steps, warmup=options.warmup)
    counted = [batches[number % len(batches)] for number in range(options.warmup, options.warmup + options.steps)]
    for variant in options.variants:
        figures = figures_of(model, options, steps[variant.label], taken, counted, variant)
        row = {**settings_row(options, variant), **figures, "peak_memory_gb": memory[variant.label]}
        print(summary(row), flush=True)
        append_row("step", row, folder=options.results, device=options.device)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with ``variants``, ``dtype`` and ``device`` as what they mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--preset", default="smollm2-135m", help=f"{', '.join(PRESETS)}; or a model folder")
    model.add_argument("--dtype", default="bfloat16", help="of the frozen weights (default: %(default)s)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    model.add_argument(
        "--checkpointing",
        choices=("none", "full", "selective"),
        default="none",
        help="activation_checkpointing of the train command (default: %(default)s)",
    )
    model.add_argument("--num-threads", type=int, help="CPU threads (default: torch's choice)")
    adapters = parser.add_argument_group("adapters")
    adapters.add_argument(
        "--compare",
        nargs="+",
        default=["lora"],
        metavar="VARIANT",
        help="lora, mixlora; 4xmixlora: four adapters that share the samples. Ratios are to the first (default: lora)",
    )
    adapters.add_argument("--adapters", type=int, default=1, help="for variants that name no number (default: 1)")
    adapters.add_argument("--rank", type=int, default=8, help="of every LoRA and expert (default: %(default)s)")
    adapters.add_argument("--experts", type=int, default=8, help="of a mixture (default: %(default)s)")
    adapters.add_argument("--top-k", type=int, default=2, help="experts a token goes to (default: %(default)s)")
    adapters.add_argument("--dropout", type=float, default=0.0, help="lora_dropout (default: %(default)s)")
    batch = parser.add_argument_group("batch")
    batch.add_argument("--tokens", type=int, help="a step, with uniform lengths (default: 256 a sample)")
    batch.add_argument("--samples", type=int, default=8, help="a step (default: %(default)s)")
    batch.add_argument(
        "--supervised", type=float, metavar="SHARE", help="of each sample, its end, with uniform lengths (default: 1)"
    )
    batch.add_argument("--lengths", choices=("uniform", "real"), default="uniform", help="(default: %(default)s)")
    batch.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="records for real lengths, .json or .jsonl; files take turns, a batch each (default: the bundled tasks)",
    )
    batch.add_argument("--template", default="alpaca", help="of real records (default: %(default)s)")
    measure = parser.add_argument_group("measurement")
    measure.add_argument("--steps", type=int, default=7, help="rounds that count (default: %(default)s)")
    measure.add_argument("--warmup", type=int, default=2, help="rounds before them (default: %(default)s)")
    measure.add_argument("--no-memory", action="store_true", help="leave peak memory out: faster")
    measure.add_argument("--results", type=Path, default=RESULTS, help="folder for the rows")
    measure.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.dtype = parse_dtype(options.dtype) or torch.float32
        options.device = parse_device(options.device)
        if options.device.type == "cuda":
            torch.cuda.set_device(options.device)
        names = [text if text[:1].isdigit() else f"{options.adapters}x{text}" for text in options.compare]
        options.variants = [parse_variant(name.removeprefix("1x")) for name in names]
        if len(set(names)) < len(names):
            raise ValueError(f"compare={' '.join(names)} names a variant twice")
        if options.lengths == "real" and (options.tokens is not None or options.supervised is not None):
            raise ValueError("tokens and supervised are the records' own with lengths=real")
        if options.lengths == "uniform" and options.data:
            raise ValueError("data is for lengths=real")
    except ValueError as error:
        parser.error(str(error))
    return options


def prepare(options: argparse.Namespace) -> tuple[LlamaForCausalLM, list[Batch], dict[str, TrainingStep]]:
    """The model, what it trains on, and each variant's step."""
    model = build_model(options.preset, options.dtype, options.device)
    model.activation_checkpointing_ = options.checkpointing
    vocab = model.config_.vocab_size
    if options.lengths == "real":
        count = options.warmup + options.steps
        batches = real_batches(options.data, options.samples, vocab, count=count, template=options.template)
    else:
        tokens = options.tokens or 256 * options.samples
        share = 1.0 if options.supervised is None else options.supervised
        batches = uniform_batches(tokens, options.samples, vocab, supervised=share)
    settings = AdapterSettings(
        r=options.rank, num_experts=options.experts, top_k=options.top_k, lora_dropout=options.dropout
    )
    return model, batches, {v.label: TrainingStep(model, v, settings, batches) for v in options.variants}


def memory_of(arguments: Sequence[str], variant: Variant) -> float | None:
    """A variant's peak memory in GB, from a process that runs nothing else."""
    if "--no-memory" in arguments:
        return None
    command = [sys.executable, __file__, *arguments, "--only-memory", "--compare", variant.label]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_memory_gb"])


def measured_memory(options: argparse.Namespace) -> float:
    """This process' peak after the steps with the most tokens."""
    reuse_freed_memory(sum(variant.num_adapters for variant in options.variants))
    _, batches, steps = prepare(options)
    (step,) = steps.values()
    largest = sorted(range(len(batches)), key=lambda number: batches[number].num_tokens)[-_MEMORY_STEPS:]
    for turn in range(_MEMORY_STEPS):
        step(largest[turn % len(largest)])
    on_gpu = options.device.type == "cuda"
    return round(torch.cuda.max_memory_allocated(options.device) / 1e9 if on_gpu else peak_memory_gb(), 3)


def figures_of(
    model: LlamaForCausalLM,
    options: argparse.Namespace,
    step: TrainingStep,
    taken: dict[str, list[float]],
    counted: list[Batch],
    variant: Variant,
) -> dict[str, Any]:
    """What a variant's times come to."""
    seconds = taken[variant.label]

    def per_second(counts: Sequence[float]) -> Spread:
        return Spread.of([count / time for count, time in zip(counts, seconds, strict=True)])

    first = options.variants[0].label
    figures: dict[str, Any] = {
        "seconds": Spread.of(seconds).row(),
        "tokens_per_second": per_second([batch.num_tokens for batch in counted]).row(),
        "supervised_per_second": per_second([batch.num_supervised for batch in counted]).row(),
        "gemm_share": paired_ratio(taken[_GEMMS], seconds).row(),
        "ratio_to": first,
        "ratio": paired_ratio(seconds, taken[first]).row(),
    }
    peak = peak_flops(options.device, options.dtype)
    if peak is not None:
        flops = [step_flops(model, batch, step.trainable_per_token) / peak for batch in counted]
        figures["mfu"] = per_second(flops).row()
    return figures


def settings_row(options: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    """Everything that was asked for, and the case's name."""
    dtype = str(options.dtype).removeprefix("torch.")
    is_real = options.lengths == "real"
    tokens = None if is_real else options.tokens or 256 * options.samples
    shape = f"{options.samples} samples" if is_real else f"{options.samples}x{tokens // options.samples}"
    supervised = None if is_real else options.supervised or 1.0
    extras = [f"dropout {options.dropout:g}"] if options.dropout else []
    extras += [f"{options.checkpointing} checkpointing"] if options.checkpointing != "none" else []
    extras += ["real lengths"] if is_real else []
    extras += [f"{supervised:.0%} supervised"] if supervised not in (None, 1.0) else []
    if variant.method != "lora":
        extras.append(f"E{options.experts} K{options.top_k}")
    device = options.device.type
    what = [Path(options.preset).name, dtype, device, shape, f"r{options.rank}", *extras]
    return {
        "case": f"{', '.join(what)}: {variant.label}",
        "preset": options.preset if options.preset in PRESETS else Path(options.preset).name,
        "dtype": dtype,
        "variant": variant.label,
        "method": variant.method,
        "adapters": variant.num_adapters,
        "compared": [other.label for other in options.variants],
        "samples": options.samples,
        "tokens": tokens,
        "lengths": options.lengths,
        "data": describe_files(options.data) if is_real else None,
        "template": options.template if is_real else None,
        "supervised": supervised,
        "rank": options.rank,
        "experts": options.experts,
        "top_k": options.top_k,
        "dropout": options.dropout,
        "checkpointing": options.checkpointing,
        "steps": options.steps,
        "warmup": options.warmup,
    }


def summary(row: dict[str, Any]) -> str:
    """A variant's row for people."""

    def spread(name: str) -> str:
        return str(Spread(**row[name]))

    lines = [
        row["case"],
        f"  tokens/s          {spread('tokens_per_second')}",
        f"  supervised/s      {spread('supervised_per_second')}",
        f"  seconds a step    {spread('seconds')}",
        f"  gemm_share        {spread('gemm_share')}",
    ]
    if "mfu" in row:
        lines.append(f"  mfu               {spread('mfu')}")
    if row["ratio_to"] != row["variant"]:
        lines.append(f"  time / {row['ratio_to']:<10} {spread('ratio')}")
    if row["peak_memory_gb"] is not None:
        lines.append(f"  peak memory       {row['peak_memory_gb']:.2f} GB")
    return "\n".join(lines) + "\n  median (20% to 80%)"


if __name__ == "__main__":
    main(sys.argv[1:])
