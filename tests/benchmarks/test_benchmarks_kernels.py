"""The kernels' benchmark proves an operation before it measures it, and counts what the operation needs."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import kernel_check
import kernel_speed
import pytest
import torch
from kernel_case import SHAPES, Case, Sizes
from kernel_cases import CASES

SCRIPT = Path(kernel_speed.__file__).with_name("kernels.py")
TINY = [
    "--shape",
    "tiny",
    "--device",
    "cpu",
    "--repeats",
    "2",
    "--warmup",
    "1",
    "--flush-mb",
    "1",
    "--num-threads",
    "1",
]


def sizes(dtype: torch.dtype = torch.float32, **changes: int) -> Sizes:
    numbers = {"tokens": 23, "samples": 3, "adapters": 3, "rank": 5, "experts": 6, "top_k": 2, **changes}
    return Sizes(config=SHAPES["tiny"], dtype=dtype, device=torch.device("cpu"), **numbers)


def errors(case: Case, *, with_reference: bool = False) -> dict[str, dict[str, float]]:
    ways = kernel_check.ways_of(case, torch.device("cpu"))
    if with_reference and case.reference is not None:
        ways["reference"] = lambda upstream: case.reference(case.inputs, upstream)
    upstream = [torch.randn_like(output) for output in ways["ours"](None)[0]]
    return kernel_check.errors_of(case, ways, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", CASES)
def test_all_ways_agree_in_outputs_and_gradients(op: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = CASES[op](sizes(dtype))
    found = errors(case, with_reference=True)
    assert len(found["ours"]) >= 1 + len(case.differentiated)
    for way, own in found.items():
        assert all(error <= kernel_check.TOLERANCES[dtype] for error in own.values()), (way, own)
    assert kernel_check.complaint_about(found, kernel_check.TOLERANCES[dtype]) == ""


@pytest.mark.parametrize(
    "op", ["rms_norm", "rotary", "causal_attention", "lora_linear", "mixlora_ffn", "linear_cross_entropy"]
)
def test_cases_of_one_token_and_one_expert_agree(op: str) -> None:
    torch.manual_seed(0)
    case = CASES[op](sizes(tokens=1, samples=1, adapters=1, experts=1, top_k=1))
    assert kernel_check.complaint_about(errors(case, with_reference=True), 1e-5) == ""


def test_one_wrong_row_is_seen() -> None:
    truth = torch.randn(2048, 4, dtype=torch.float64)
    wrong = truth.clone()
    wrong[1234] *= 1.2
    assert kernel_check.worst_row(truth.float(), truth) < 1e-6
    assert 0.05 < kernel_check.worst_row(wrong, truth) <= 0.21
    wrong[0, 0] = float("nan")
    assert kernel_check.complaint_about({"ours": {"output 0": kernel_check.worst_row(wrong, truth)}}, 1e9)


def test_no_speed_is_reported_of_an_operation_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(sizes: Sizes) -> Case:
        case = swiglu(sizes)
        # The output is right and one gradient is not.
        return replace(case, ours=lambda inputs: case.ours({**inputs, "up": inputs["up"].detach()}) + 0 * inputs["up"])

    swiglu = CASES["swiglu"]
    monkeypatch.setitem(CASES, "swiglu", wrong)
    monkeypatch.setattr(
        kernel_speed, "machine_limits", lambda *_, **__: {"limit_gb_per_second": 1.0, "limit_gflops": 1.0}
    )
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as stop:
            kernel_speed.main([*TINY, "--dtype", "float32", "--ops", "swiglu", "rms_norm", "--results", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert stop.value.code == 1
    assert "WRONG" in printed and "gradient of up" in printed and "gradient of gate" not in printed
    (row,) = rows(tmp_path)  # the others are measured
    assert row["op"] == "rms_norm"


def test_bytes_are_those_of_every_input_and_result_once() -> None:
    numbers = sizes(torch.bfloat16, tokens=7)
    norm = CASES["rms_norm"](numbers)
    assert norm.bytes_needed([norm.inputs["x"]]) == (2 * (2 * 7 * 64 + 64), 2 * (3 * 7 * 64 + 64))
    head = CASES["linear_cross_entropy"](numbers)
    nll = torch.empty(7)
    assert head.bytes_needed([nll]) == (2 * (7 + 512) * 64 + 8 * 7 + 4 * 7, 4 * 7 + 2 * 7 * 64)


def test_flops_are_those_of_the_products_that_autograd_runs() -> None:
    """Of the naive way, which in these operations computes nothing twice."""
    from torch.utils.flop_counter import FlopCounterMode

    for op in ("lora_linear", "mixlora_ffn", "grouped_matmul", "linear_cross_entropy", "frozen_linear", "wide_linear"):
        torch.manual_seed(0)
        case = CASES[op](sizes())
        naive = kernel_check.differentiated(case.naive, case.inputs, case.differentiated)
        with FlopCounterMode(display=False) as counter:
            outputs, _ = naive(None)
        assert counter.get_total_flops() == case.flops[0], op
        with FlopCounterMode(display=False) as counter:
            naive(outputs)
        assert counter.get_total_flops() == sum(case.flops), op


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "kernels.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ops", "swigul"], "did you mean 'swiglu'"),
        (["--dtype", "bf17"], "dtype='bf17'"),
        (["--top-k", "9"], "top_k=9 must be in 1..experts=8"),
        (["--tokens", "3"], "samples=8 must be at most tokens=3"),
        (["--rank", "0"], "rank=0"),
        (["--repeats", "0"], "repeats=0"),
    ],
)
def test_a_mistake_is_named(arguments: Sequence[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        kernel_speed.parse(arguments)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_the_script_leaves_a_row_an_operation(tmp_path: Path) -> None:
    settings = ["--tokens", "24", "--dtype", "float32", "--results", str(tmp_path)]
    done = subprocess.run([sys.executable, SCRIPT, *TINY, *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    assert [row["op"] for row in found] == list(CASES)
    for row in found:
        assert row["limit_gb_per_second"] > 0 and row["limit_gflops"] > 0 and row["flush_mb"] == 1
        for which in kernel_speed.PASSES:
            figures = row[which]
            for spread in (*figures["ms"].values(), *figures["over_ours"].values()):
                assert 0 < spread["p20"] <= spread["median"] <= spread["p80"]
            has_reference = row["op"] not in ("frozen_linear", "wide_linear")  # they are a product alone
            assert list(figures["ms"]) == ["ours", *(["reference"] if has_reference else []), "naive"]
            assert figures["share"] > 0
            rate = figures["bytes"] / 1e6 / figures["ms"]["ours"]["median"]
            assert figures["gb_per_second"] == pytest.approx(rate, rel=2e-3)
        assert row["forward+backward"]["bytes"] > row["forward"]["bytes"]
        assert row["op"] in done.stdout and row["shape"] in done.stdout


def test_transformers_may_import_the_script_by_its_name(tmp_path: Path) -> None:
    """As it does in a peer's process, where this project's packages are not installed."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import kernels; "
        "assert kernels.__version__ == '0.0.0' and not {'torch', 'moe_peft', 'kernel_speed'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, SCRIPT.parent], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
