"""Every operation of kernels/ against its reference and against the naive way, forward and with its backward.

    python benchmarks/kernels.py                                        all, at SmolLM2-135M's shapes
    python benchmarks/kernels.py --ops swiglu mixlora_ffn --dtype bf16
    python benchmarks/kernels.py --shape llama-7b --device cuda --tokens 16384 --rank 16 --dtype bfloat16

Three ways to compute the same thing take turns in one process: ours, as a model calls it (Triton on a GPU,
compiled C++ on a CPU); the plain-PyTorch reference; and the naive way, what a user would write for autograd. A ratio
is the median of the ratios round by round, naive over ours: 2 means that ours takes half the time. The forward alone
runs without autograd; forward+backward is what training pays, the gradients of every input and adapter weight included.
Before every run a buffer is overwritten, so that nothing is read from a cache.

First comes the proof: outputs and gradients of each way are compared with the naive way in a wider dtype (float32 for
16-bit types, else float64). The worst row's error, over that row's norm or the root mean square of all rows' if that
is larger, must be within {tolerances}.
Of an operation that is wrong no speed is reported, and the exit code is 1.

The limit is the machine's own: a big copy for bytes, a big matrix product in the dtype for FLOPs, measured first. What
an operation needs at least is every input and result passing through memory once, and its products; whichever of the
two takes longer at the machine's limit bounds it, and share is that time over ours. A share above
1 means that the machine was busy while its limit was measured: measure again.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_case import SHAPES, Case, Sizes, Tensors
from kernel_cases import CASES
from kernel_check import TOLERANCES, Way, complaint_about, errors_of, ways_of
from rows import RESULTS, append_row
from timing import Spread, paired_ratio, readable, take_turns
from torch import Tensor

from moe_peft.command.memory import reuse_freed_memory
from moe_peft.io.placement import parse_device, parse_dtype
from moe_peft.kernels.products import matmul_t
from moe_peft.strict import nearest

PASSES = ("forward", "forward+backward")
_LIMIT_ROUNDS = 7


def main(arguments: Sequence[str]) -> None:
    """Check, measure, print, and append one row an operation and dtype."""
    options = parse(arguments)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    if options.device.index is not None:
        torch.cuda.set_device(options.device)
    reuse_freed_memory(max(sizes.adapters for sizes in options.sizes))
    wrong = []
    for sizes in options.sizes:
        limits = machine_limits(sizes.dtype, sizes.device, rounds=min(options.repeats, _LIMIT_ROUNDS))
        print(f"\n{describe(options, sizes)}\n{limits_line(limits)}\n{HEADER}", flush=True)
        for op in options.ops:
            torch.manual_seed(0)
            case = CASES[op](sizes)
            ways = ways_of(case, sizes.device)
            upstream = [torch.randn_like(output) for output in ways["ours"](None)[0]]
            errors = errors_of(case, ways, upstream)
            if complaint := complaint_about(errors, TOLERANCES[sizes.dtype]):
                print(f"{op:<21} WRONG, so no speed is reported: {complaint}", flush=True)
                wrong.append(op)
                continue
            figures = measure(case, ways, upstream, options, limits)
            row = {**settings_row(options, sizes, op), "shape": case.shape, "errors": errors, **limits, **figures}
            print(summary(op, case.shape, row), flush=True)
            append_row("kernels", row, folder=options.results, device=sizes.device)
    if wrong:
        sys.exit(1)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with ``sizes``, one a dtype, and ``device`` as what they mean."""
    tolerances = ", ".join(f"{value:g} in {str(dtype).removeprefix('torch.')}" for dtype, value in TOLERANCES.items())
    about = (__doc__ or "").format(tolerances=tolerances)
    parser = argparse.ArgumentParser(
        prog="kernels.py", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", default=list(CASES), metavar="OP", help=f"of {', '.join(CASES)} (all)")
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32"], help="of weights and hidden states (bfloat16 float32)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, help="CPU threads (default: torch's choice)")
    shape = parser.add_argument_group("shape")
    shape.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="(default: %(default)s)")
    shape.add_argument("--tokens", type=int, default=2048, help="(default: %(default)s)")
    shape.add_argument("--samples", type=int, default=8, help="of the attention (default: %(default)s)")
    shape.add_argument("--adapters", type=int, default=4, help="of lora_linear (default: %(default)s)")
    shape.add_argument("--rank", type=int, default=8, help="of every LoRA and expert (default: %(default)s)")
    shape.add_argument("--experts", type=int, default=8, help="of a mixture (default: %(default)s)")
    shape.add_argument("--top-k", type=int, default=2, help="experts a token goes to (default: %(default)s)")
    measurement = parser.add_argument_group("measurement")
    measurement.add_argument("--repeats", type=int, default=15, help="rounds that count (default: %(default)s)")
    measurement.add_argument("--warmup", type=int, default=3, help="rounds before them (default: %(default)s)")
    measurement.add_argument(
        "--flush-mb", type=int, default=256, help="overwritten before every run; 0: caches stay warm (%(default)s)"
    )
    measurement.add_argument("--results", type=Path, default=RESULTS, help="folder for the rows")
    options = parser.parse_args(arguments)
    try:
        options.device = parse_device(options.device)
        for op in options.ops:
            if op not in CASES:
                raise ValueError(f"op={op!r} must be one of {', '.join(CASES)}{nearest(op, CASES)}")
        if options.repeats < 1 or options.warmup < 0 or options.flush_mb < 0:
            raise ValueError(
                f"repeats={options.repeats} must be at least 1, warmup={options.warmup} and "
                f"flush_mb={options.flush_mb} at least 0"
            )
        options.sizes = [
            Sizes(
                config=SHAPES[options.shape],
                dtype=parse_dtype(dtype) or torch.float32,
                device=options.device,
                tokens=options.tokens,
                samples=options.samples,
                adapters=options.adapters,
                rank=options.rank,
                experts=options.experts,
                top_k=options.top_k,
            )
            for dtype in options.dtype
        ]
    except ValueError as error:
        parser.error(str(error))
    return options


def machine_limits(dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, float]:
    """Bytes and FLOPs a second that a big copy and a big product in a dtype reach in their best round."""
    timed = partial(seconds_of, device=device, flush=None)
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source)) for _ in range(rounds))
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    products = (lambda: torch.mm(a, b.T), lambda: matmul_t(a, b))  # on a CPU by different libraries in float32
    product = min(timed(run) for run in products for _ in range(rounds))
    return {
        "limit_gb_per_second": _digits(2 * 2**28 / copy / 1e9),
        "limit_gflops": _digits(2 * size**3 / product / 1e9),
    }


def seconds_of(action: Callable[[], object], device: torch.device, flush: Tensor | None) -> float:
    """Seconds that an action takes on its device, once a buffer has been overwritten.

    On a GPU the overwriting is still running when the action's launches are queued, as those of a model's operations
    queue up behind each other: what counts is what the device does between two events.
    """
    if device.type != "cuda":
        if flush is not None:
            flush.zero_()
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if flush is not None:
        flush.zero_()
    begin.record()
    action()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def measure(
    case: Case, ways: Mapping[str, Way], upstream: Tensors, options: argparse.Namespace, limits: Mapping[str, float]
) -> dict[str, Any]:
    """Times, ratios and shares of both passes."""
    device = options.device
    flush = torch.empty(options.flush_mb << 20, dtype=torch.uint8, device=device) if options.flush_mb else None
    given = {PASSES[0]: None, PASSES[1]: upstream}
    runs = {f"{label} {which}": partial(way, given[which]) for label, way in ways.items() for which in PASSES}
    actions = {name: partial(_turn, run, device, flush) for name, run in runs.items()}
    taken = take_turns(actions, rounds=options.repeats, warmup=options.warmup)
    bytes_forward, bytes_backward = case.bytes_needed(upstream)
    flops_forward, flops_backward = case.flops
    needed = (bytes_forward, flops_forward), (bytes_forward + bytes_backward, flops_forward + flops_backward)
    figures = {}
    for which, (num_bytes, flops) in zip(PASSES, needed, strict=True):
        ours = taken[f"ours {which}"]
        seconds = Spread.of(ours).median
        by_bytes = num_bytes / 1e9 / limits["limit_gb_per_second"]
        by_flops = flops / 1e9 / limits["limit_gflops"]
        figures[which] = {
            "ms": {label: Spread.of([1e3 * t for t in taken[f"{label} {which}"]]).row() for label in ways},
            "over_ours": {
                label: paired_ratio(taken[f"{label} {which}"], ours).row() for label in ways if label != "ours"
            },
            "bytes": num_bytes,
            "flops": flops,
            "gb_per_second": _digits(num_bytes / 1e9 / seconds),
            "gflops": _digits(flops / 1e9 / seconds),
            "bound": "bytes" if by_bytes > by_flops else "flops",
            "share": _digits(max(by_bytes, by_flops) / seconds),
            "peak_mb": {label: peak_mb(runs[f"{label} {which}"], device) for label in ways},
        }
    return figures


def _turn(run: Callable[[], object], device: torch.device, flush: Tensor | None, number: int) -> float:
    return seconds_of(run, device, flush)


def peak_mb(run: Callable[[], object], device: torch.device) -> float | None:
    """What a run takes on top of its inputs, results included, in 10^6 bytes; a CPU's allocator does not tell."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return _digits((torch.cuda.max_memory_allocated(device) - before) / 1e6)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def describe(options: argparse.Namespace, sizes: Sizes) -> str:
    """Settings that tell one table from another."""
    what = [options.shape, str(sizes.dtype).removeprefix("torch."), sizes.device.type, f"{sizes.tokens} tokens"]
    what += [f"{sizes.samples} samples", f"{sizes.adapters} adapters"]
    return ", ".join([*what, f"r{sizes.rank}", f"E{sizes.experts} K{sizes.top_k}"])


def settings_row(options: argparse.Namespace, sizes: Sizes, op: str) -> dict[str, Any]:
    """Everything that was asked for, and the case's name."""
    numbers = ("tokens", "samples", "adapters", "rank", "experts", "top_k")
    return {
        "case": f"{describe(options, sizes)}: {op}",
        "op": op,
        "preset": options.shape,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        **{name: getattr(sizes, name) for name in numbers},
        "repeats": options.repeats,
        "warmup": options.warmup,
        "flush_mb": options.flush_mb,
        "tolerance": TOLERANCES[sizes.dtype],
    }


def limits_line(limits: Mapping[str, float]) -> str:
    """The machine's limits for people."""
    copy, product = limits["limit_gb_per_second"], limits["limit_gflops"]
    return f"limits measured: a big copy {readable(copy)} GB/s, a big product {readable(product)} GFLOP/s"


HEADER = "ms and ratios: median (20% to 80%)"


def summary(op: str, shape: str, row: Mapping[str, Any]) -> str:
    """An operation's row for people."""
    worst = {label: max(errors.values()) for label, errors in row["errors"].items()}
    lines = [f"{op}  {shape}  (worst error: {', '.join(f'{label} {error:g}' for label, error in worst.items())})"]
    for which in PASSES:
        figures = row[which]
        for label, spread in figures["ms"].items():
            line = f"  {which:<17} {label:<10} {Spread(**spread)!s:<26}"
            if label == "ours":
                is_bytes = figures["bound"] == "bytes"
                rate, unit = (figures["gb_per_second"], "GB/s") if is_bytes else (figures["gflops"], "GFLOP/s")
                needs = f"{readable(figures['bytes'] / 1e6)} MB"
                if figures["flops"]:
                    needs += f", {readable(figures['flops'] / 1e9)} GFLOP"
                line += f" {readable(rate)} {unit}, {figures['share']:.0%} of the limit; needs {needs}"
            else:
                line += f" {Spread(**figures['over_ours'][label])} x ours"
            peak = figures["peak_mb"][label]
            lines.append(line if peak is None else f"{line}; peak {readable(peak)} MB")
    return "\n".join(lines)
