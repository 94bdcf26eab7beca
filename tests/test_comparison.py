"""What methods cost, beside what a real adapter on a real model takes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_config, tiny_model
from tiny_run import make_base_folder
from torch.utils.flop_counter import FlopCounterMode

from moe_peft import (
    BatchConfig,
    LlamaConfig,
    LoraConfig,
    MixLoraConfig,
    ModelInput,
    PromptTuningConfig,
    compare_methods,
    save_adapter,
)
from moe_peft.adapters import METHODS
from moe_peft.comparison.flops import _products
from moe_peft.comparison.words import read_methods
from moe_peft.config import AdapterJob
from moe_peft.io.base_model import BaseModelShape
from moe_peft.training.optimizer import build_optimizer

CONTEXT = 24


def shape_of(config: LlamaConfig | None = None, dtype: torch.dtype = torch.float32) -> BaseModelShape:
    """A tiny base model that is on no disk."""
    return BaseModelShape(config or tiny_config(), dtype, torch.device("cpu"))


def cost_of(config: Any, **changes: Any) -> Any:
    """One method on the tiny model, or one with other fields."""
    (cost,) = compare_methods(shape_of(tiny_config(**changes)), {"x": config}, context=CONTEXT)
    return cost


def lora_flops(model: LlamaConfig, rank: int, tokens: int) -> int:
    """Of a step of one sample that is learnt whole, by hand.

    Each projection runs forward, and back to its input but for what reads the embedding; a low-rank pair does the
    same, and has its own two gradients. Attention of up to 128 tokens is two products over all pairs of tokens, seven
    with its backward, which computes the scores again. The head runs forward and back over all tokens but the last.
    """
    d, f, v = model.hidden_size, model.intermediate_size, model.vocab_size
    kv = model.num_kv_heads * model.head_size
    reading_input, others = [(d, d), (d, kv), (d, kv)], [(d, d), (d, f), (d, f), (f, d)]
    total = 0
    for layer in range(model.num_hidden_layers):
        for i, o in reading_input + others:
            passes = 1 if layer == 0 and (i, o) in reading_input[1:] else 2
            total += passes * 2 * i * o + 2 * rank * (i + o) + 2 * rank * (2 * o + passes * i)
        total -= (2 * d * d + 2 * rank * d) if layer == 0 else 0  # q, whose shape o_proj has, too
        total += 7 * 2 * tokens * d
    return tokens * total + (tokens - 1) * 4 * d * v


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("rank", [3, 8])
def test_flops_of_lora_are_those_worked_out_by_hand(num_layers: int, rank: int) -> None:
    model = tiny_config(num_hidden_layers=num_layers)
    cost = cost_of(LoraConfig(r=rank), num_hidden_layers=num_layers)
    assert cost.flops_per_token == lora_flops(model, rank, CONTEXT) / CONTEXT
    assert cost.relative_flops == lora_flops(model, rank, CONTEXT) / lora_flops(model, 8, CONTEXT)


def flops_of_real_step(config: Any, num_layers: int) -> float:
    """A token, counted by torch on a model of real numbers."""
    model = tiny_model(tiny_config(num_hidden_layers=num_layers), dtype=torch.float64)
    model.add_adapter("x", config)
    tokens = torch.arange(CONTEXT)
    batch = ModelInput(tokens, torch.tensor([0, CONTEXT], dtype=torch.int32), (BatchConfig("x", 0, 1),), tokens)
    with FlopCounterMode(display=False, custom_mapping=_products()) as counter:
        (output,) = model(batch)
        (output.loss + output.aux_loss).backward()
    return counter.get_total_flops() / CONTEXT


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_of_a_real_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more layers than the count looks at; on a CPU that, as a GPU, spares no attention of the last layer."""
    monkeypatch.setattr("moe_peft.model.llama.LONG_SAMPLE", 0)
    config = METHODS[method]()
    assert cost_of(config, num_hidden_layers=5).flops_per_token == flops_of_real_step(config, 5)


UNEVEN = [
    *({"layers_to_transform": (layer,)} for layer in range(5)),
    {"layers_to_transform": (0, 3)},
    {"rank_pattern": {"layers.3.self_attn.q_proj": 5}},
]


@pytest.mark.parametrize("changes", UNEVEN, ids=str)
def test_layers_need_not_be_alike(changes: dict[str, Any]) -> None:
    config = LoraConfig(**changes)
    assert cost_of(config, num_hidden_layers=5).flops_per_token == flops_of_real_step(config, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_bytes_are_those_of_a_real_adapter(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = METHODS[method]()
    model = tiny_model(dtype=dtype)
    base = sum(weight.numel() for weight in model.parameters())
    model.add_adapter("x", config)
    save_adapter(model, "x", tmp_path / "x")
    job = AdapterJob(name="x", method=method, adapter=config, data="none")
    optimizer = build_optimizer(model, job)
    weights = model.adapter_parameters("x")
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    (cost,) = compare_methods(model, [method], context=CONTEXT)
    trained = sum(weight.numel() for weight in weights)
    assert (cost.base_parameters, cost.trainable_parameters, cost.total_parameters) == (base, trained, base + trained)
    assert (cost.share, cost.reduction) == (trained / base, base / trained)
    assert cost.saved_bytes == sum(file.stat().st_size for file in (tmp_path / "x").iterdir())
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert cost.optimizer_bytes == sum(moment.nbytes for moment in moments)
    assert (cost.name, cost.method, cost.config) == (method, method, config)
    assert model.adapter_names == ["x"]  # a loaded model is only looked at


IN_A_FRESH_PROCESS = """
import resource, torch
from moe_peft import LlamaConfig, compare_methods
from moe_peft.adapters import METHODS
from moe_peft.io.base_model import BaseModelShape
config = LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=3,
                     num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=4096)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
compare_methods(BaseModelShape(config, torch.bfloat16, torch.device("cpu")), list(METHODS), context=64)
print(peak() - before)
"""


@pytest.mark.slow
def test_no_weight_of_the_base_takes_memory() -> None:
    """Layers as wide as LLaMA-70B's: an MLP's weight would take 470 MB, the embedding 2.1 GB; libraries take 170."""
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < 400e6


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_inits_that_decompose_the_base_decompose_nothing_here(init: str) -> None:
    plain = cost_of(LoraConfig())
    cost = cost_of(LoraConfig(init_lora_weights=init))
    assert cost.trainable_parameters == plain.trainable_parameters
    assert cost.saved_bytes > 1.8 * plain.saved_bytes  # the initial factors go with them


def test_rows_are_named_after_what_they_set() -> None:
    costs = compare_methods(
        shape_of(),
        [
            "lora",
            LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
            MixLoraConfig(num_experts=2, expert_lora={"r": 1}),
        ],
        context=CONTEXT,
    )
    assert [cost.name for cost in costs] == [
        "lora",
        "lora r=2 target_modules=[q_proj,v_proj]",
        "mixlora num_experts=2 expert_lora.r=1",
    ]
    assert costs[0].relative_flops == 1
    assert json.loads(json.dumps(costs[1].to_dict()))["config"]["r"] == 2


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        (["lroa"], {}, "method='lroa' must be one of .*; did you mean 'lora'"),
        ("lora", {}, "methods='lora' must be a list of methods: put it in brackets"),
        (LoraConfig(), {}, "must be a list of methods"),
        (["lora", LoraConfig()], {}, "methods has 'lora' twice"),
        ([3], {}, "3 is not the config of a method: LoraConfig, "),
        ({"x": "lora"}, {}, "'lora' is not the config of a method"),
        (["lora"], {"context": 1}, r"context=1 must be in 2\.\.64, for which the base model is made"),
        (["lora"], {"context": 65}, r"context=65 must be in 2\.\.64"),
        ({"long": LoraConfig(layers_to_transform=(7,))}, {}, "long: layers_to_transform"),
    ],
)
def test_what_cannot_be_compared(methods: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_methods(shape_of(), methods, **{"context": CONTEXT, **changes})


def test_the_words_of_a_command_line(tmp_path: Path) -> None:
    config = {"base_model": "x", "adapters": [{"name": "mine", "method": "lora", "r": 3, "data": "d.jsonl"}]}
    (tmp_path / "run.json").write_text(json.dumps(config))
    words = ["lora", "lora", "r=4", "lora_alpha=2", "mixlora:num_experts=3,target_modules=[q_proj, up_proj],top_k=1"]
    assert read_methods(
        [*words, str(tmp_path / "run.json"), "mixlora", "expert_lora.r=2", "expert_lora.lora_alpha=4"]
    ) == {
        "lora": LoraConfig(),
        "lora r=4 lora_alpha=2.0": LoraConfig(r=4, lora_alpha=2),
        "mixlora target_modules=[q_proj,up_proj] num_experts=3 top_k=1": MixLoraConfig(
            num_experts=3, target_modules=["q_proj", "up_proj"], top_k=1
        ),
        "mine": LoraConfig(r=3),
        "mixlora expert_lora.r=2 expert_lora.lora_alpha=4.0": MixLoraConfig(expert_lora={"r": 2, "lora_alpha": 4}),
    }
    assert read_methods([]) == {name: method() for name, method in METHODS.items()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["r=2"], "'r=2' is a setting without a method: write it behind one"),
        (["lroa"], "method='lroa' must be one of .*; did you mean 'lora'.*; or a config file"),
        (["lora", "rr=2"], "lora.rr=2 is not a known key; did you mean 'r'"),
        (["lora:rr=2"], "lora.rr=2 is not a known key; did you mean 'r'"),
        (["lora", "r=x"], "lora.r='x' must be int, not str"),
        (["lora", "r=0"], "lora.r=0 must be at least 1"),
        (["lora", "r=1", "r=2"], "lora.r is set twice: to 1 and to 2"),
        (["lora:r=1", "r=2"], "lora.r is set twice"),
        (["mixlora", "expert_lora=3", "expert_lora.r=2"], "sets a part of mixlora.expert_lora, which is set to 3"),
        (["lora", "lora"], "'lora' is named twice"),
        (["lora:r"], "override 'r' must be written key=value"),
        (["lora", "run.yaml", "r=2"], "'run.yaml' does not exist"),
    ],
)
def test_bad_words(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_methods(words)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model's folder."""
    return make_base_folder(tmp_path_factory.mktemp("base"))


def test_the_command(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_peft.compare import main

    assert main([str(base), "lora", "r=2", "mixlora", "--context", "16", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    costs = compare_methods(base, [LoraConfig(r=2), "mixlora"], context=16)
    assert rows == json.loads(json.dumps([cost.to_dict() for cost in costs]))
    assert main([str(base), "lora", "--context", "16", "--markdown"]) == 0
    head, line, row = capsys.readouterr().out.splitlines()
    assert head.startswith("| method | trainable | total | of base |")
    assert line.count("---:") == row.count("|") - 2 == 8
    assert main([str(base), "lora", "--context", "16"]) == 0
    text = capsys.readouterr().out
    assert f"{costs[0].base_parameters:,} frozen parameters; FLOPs a token in samples of 16" in text
    assert "1.000×" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no base model 'nowhere'"),
        (["BASE", "lora", "--json", "--markdown"], "--json is for programs and --markdown for documents"),
        (["BASE", "lora", "--context", "1"], "context=1 must be in"),
        (["BASE", "lora", "--contxt", "1"], "unknown argument '--contxt'; did you mean '--context'"),
        (["BASE", "lora", "--dtype", "fp99"], "dtype='fp99' must be one of"),
        ([], "BASE"),
    ],
)
def test_bad_commands(arguments: list[str], message: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_peft.compare import main

    assert main([str(base) if word == "BASE" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_text_to_start_from_is_read_with_the_bases_tokenizer(base: Path) -> None:
    text = PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="TEXT", prompt_tuning_init_text="Say it:")
    random = PromptTuningConfig(num_virtual_tokens=4)
    one, other = compare_methods(base, {"text": text, "random": random}, context=16)
    assert one.trainable_parameters == other.trainable_parameters == 4 * 24
    assert one.flops_per_token == other.flops_per_token > 0


def test_a_context_leaves_room_for_virtual_tokens() -> None:
    config = PromptTuningConfig(num_virtual_tokens=20)
    assert compare_methods(shape_of(), [config], context=44)
    with pytest.raises(ValueError, match=r"context=45 must be in 2\.\.44, .* less the 20 virtual tokens of a method"):
        compare_methods(shape_of(), [config], context=45)


@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(num_virtual_tokens=63), METHODS["prefix_tuning"](num_virtual_tokens=300)],
    ids=["one too many", "far too many"],
)
def test_more_virtual_tokens_than_the_base_is_made_for(config: Any) -> None:
    message = rf"x: {config.num_virtual_tokens} virtual tokens leave a sample no two of the 64"
    with pytest.raises(ValueError, match=message):
        compare_methods(shape_of(), {"y": LoraConfig(), "x": config}, context=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": None}, "methods=None must be a list of methods"),
        ({"methods": 5}, "methods=5 must be a list of methods"),
        ({"methods": LoraConfig}, "methods=<class .* must be a list of methods"),
        ({"methods": []}, "methods must hold at least one method"),
        ({"methods": {}}, "methods must hold at least one method"),
        ({"methods": iter(())}, "must hold at least one method"),
        ({"methods": [None]}, "None is not the config of a method"),
        ({"context": "x"}, "context='x' must be int, not str"),
        ({"context": None}, "context=None must be int"),
        ({"context": float("nan")}, "context=nan must be int"),
        ({"context": 8.5}, "context=8.5 must be int"),
        ({"base": None}, "the base model None must be a folder"),
        ({"base": 5}, "the base model 5 must be a folder"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_methods(**{"base": shape_of(), "methods": ["lora"], "context": 8, **changes})


def test_a_base_without_a_tokenizer_can_be_compared(base: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(base / name)
    assert compare_methods(tmp_path, ["lora"], context=16)[0].trainable_parameters > 0
    assert dataclasses.is_dataclass(compare_methods(tmp_path, ["lora"], context=16)[0])
