"""The parts of the benchmarks: who is measured when, what is counted, what the report writes."""

import json
import types
from pathlib import Path

import batches as batches_module
import export
import ours
import peers
import presets
import pytest
import report
import roofline
import rows as rows_module
import step as step_module
import timing
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_peft import BatchConfig, LlamaForCausalLM, ModelInput
from moe_peft.io.hf_config import read_llama_config


def test_actions_take_turns_and_every_second_round_is_reversed() -> None:
    calls: list[tuple[str, int]] = []

    def action(name: str):
        def run(number: int) -> float:
            calls.append((name, number))
            return 10.0 * number + (name == "b")

        return run

    taken = timing.take_turns({"a": action("a"), "b": action("b")}, rounds=2, warmup=1)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert taken == {"a": [10.0, 20.0], "b": [11.0, 21.0]}


def test_a_paired_ratio_does_not_see_the_machine_slow_down() -> None:
    slower = [1.0, 2.0, 4.0, 8.0]
    ratio = timing.paired_ratio([3 * seconds for seconds in slower], slower)
    assert (ratio.p20, ratio.median, ratio.p80) == (3.0, 3.0, 3.0)


def test_spread_is_in_order_and_of_something() -> None:
    spread = timing.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (spread.p20, spread.median, spread.p80) == (2.0, 3.5, 5.0)
    with pytest.raises(ValueError, match="no measurement"):
        timing.Spread.of([])


def test_uniform_batches_supervise_the_end_of_every_sample() -> None:
    (batch,) = batches_module.uniform_batches(24, 3, 100, supervised=0.25, count=1)
    assert batch.lengths == [8, 8, 8] and batch.num_tokens == 24 and batch.num_supervised == 6
    for sample in batch.samples:
        assert sample.labels == (-100,) * 6 + sample.input_ids[6:]
    (whole,) = batches_module.uniform_batches(24, 3, 100, count=1)
    assert whole.num_supervised == 21  # nothing predicts a sample's first token


@pytest.mark.parametrize(("tokens", "samples", "share"), [(25, 3, 1.0), (3, 3, 1.0), (24, 0, 1.0), (24, 3, 0.0)])
def test_batches_that_cannot_be_are_refused(tokens: int, samples: int, share: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        batches_module.uniform_batches(tokens, samples, 100, supervised=share)


@pytest.mark.parametrize(("text", "method", "count"), [("lora", "lora", 1), ("12xmixlora", "mixlora", 12)])
def test_variants(text: str, method: str, count: int) -> None:
    variant = ours.parse_variant(text)
    assert (variant.label, variant.method, variant.num_adapters) == (text, method, count)


def tiny_step(variant: str, batch: "batches_module.Batch") -> "ours.TrainingStep":
    model = presets.random_model(presets.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    settings = ours.AdapterSettings(r=2, num_experts=4, top_k=1)
    return ours.TrainingStep(model, ours.parse_variant(variant), settings, [batch])


def test_a_step_trains_every_adapter_on_its_share() -> None:
    (batch,) = batches_module.uniform_batches(32, 4, 512, count=1)
    step = tiny_step("2xmixlora", batch)
    losses = []
    for number in range(12):
        assert step(number) > 0
        losses.append(step.losses)
    assert all(len(pair) == 2 for pair in losses)
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert last < first


def test_samples_that_adapters_cannot_share_are_refused() -> None:
    (batch,) = batches_module.uniform_batches(32, 4, 512, count=1)
    with pytest.raises(ValueError, match="samples=4 must be a multiple"):
        tiny_step("3xlora", batch)


def test_the_gemms_alone_are_those_that_a_step_needs() -> None:
    (batch,) = batches_module.uniform_batches(40, 4, 512, supervised=0.5, count=1)
    # In bfloat16, because torch does not count the products that float32 runs through oneDNN.
    model = presets.random_model(presets.SHAPES["tiny"], torch.bfloat16, torch.device("cpu"))
    gemms = roofline.BaseGemms(model, [batch])
    with FlopCounterMode(display=False) as counter:
        gemms(0)
    tokens, labelled = 40, 20
    d, f, kv, vocab = 64, 96, 32, 512
    query, key_value, ffn = d * d, 2 * d * kv, 3 * d * f
    lowest = tokens * (query + key_value) + 2 * tokens * (query + ffn)  # no gradient for what reads the embedding
    highest = 2 * tokens * key_value + 2 * labelled * (2 * query + ffn)
    assert counter.get_total_flops() == 2 * (lowest + highest + 2 * labelled * d * vocab)


def test_flops_give_the_roofline_of_a_7b_model() -> None:
    """DESIGN's figure: 34.8k tokens a second at an H100's peak, with samples of 2048 tokens and rank 16."""
    with torch.device("meta"):
        model = LlamaForCausalLM(presets.SHAPES["llama-7b"])
    (batch,) = batches_module.uniform_batches(4096, 2, 100, count=1)
    flops = roofline.step_flops(model, batch, 40e6)
    assert 989e12 / (flops / batch.num_tokens) == pytest.approx(34_800, rel=0.02)


def test_of_a_case_on_a_device_the_newest_row_counts(tmp_path: Path) -> None:
    for device, case, seconds in (("x", "a", 1), ("x", "b", 2), ("y", "a", 3), ("x", "a", 4)):
        with (tmp_path / "step.jsonl").open("a") as file:
            file.write(json.dumps({"device": device, "case": case, "seconds": seconds}) + "\n")
    assert [row["seconds"] for row in rows_module.read_rows(tmp_path)["step"]] == [4, 2, 3]


@pytest.mark.parametrize(
    "text",
    ["no markers", f"{report.BEGIN}\nno end", f"{report.END}\n{report.BEGIN}", f"{report.BEGIN}{report.END}" * 2],
)
def test_a_file_without_its_markers_stays_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="must have the line"):
        report.replace_between_markers(path, "new")
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        (step_module, ["--compare", "mixlroa"], "did you mean 'mixlora'"),
        (step_module, ["--compare", "lora", "1xlora"], "twice"),
        (step_module, ["--adapters", "0"], "0xlora"),
        (step_module, ["--lengths", "real", "--tokens", "64"], "lengths=real"),
        (step_module, ["--data", "records.jsonl"], "lengths=real"),
        (step_module, ["--dtype", "bf17"], "dtype='bf17'"),
        (peers, ["--cases", "peft-lora"], "invalid choice: 'peft-lora'"),
        (peers, ["--cases", "original-mixlora-best", "--preset", "llama-7b"], "original-mixlora-best"),
        (peers, ["--data", "records.jsonl"], "real cases"),
    ],
)
def test_a_mistake_is_named(
    script: types.ModuleType, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.parse(arguments)
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(("ours_loss", "is_same"), [(2.01, True), (2.2, False), (float("nan"), False)])
def test_two_sides_that_compute_something_else_are_not_compared(ours_loss: float, is_same: bool) -> None:
    if is_same:
        peers.check_losses([1.0, ours_loss], [1.0, 2.0], "tiny")
        return
    with pytest.raises(RuntimeError, match="the first losses differ"):
        peers.check_losses([1.0, ours_loss], [1.0, 2.0], "tiny")


def test_an_exported_preset_is_the_same_model(tmp_path: Path) -> None:
    folder = export.export_preset("tiny", tmp_path / "model")
    model = presets.build_model("tiny", torch.float32, torch.device("cpu"))
    again = presets.build_model(str(folder), torch.float32, torch.device("cpu"))
    assert again.config_ == model.config_
    for (name, weight), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(weight, other), name
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)
    theirs = AutoModelForCausalLM.from_pretrained(folder)(ids[None]).logits[0]
    batch = ModelInput(ids, torch.tensor([0, 20]), (BatchConfig("", 0, 1),))
    torch.testing.assert_close(model(batch)[0].logits, theirs, rtol=0, atol=1e-5)


def test_every_shape_without_weights_has_a_config_that_reads_back(tmp_path: Path) -> None:
    for preset in export.WITHOUT_WEIGHTS:
        assert read_llama_config(export.export_preset(preset, tmp_path / preset)) == presets.SHAPES[preset]
