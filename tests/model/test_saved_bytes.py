"""The bytes that docs/performance.md says training keeps are the bytes that it keeps."""

import importlib
import importlib.util
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import Run, fuse, random_samples, run_step, tiny_config, tiny_model

from moe_peft import LlamaConfig, LoraConfig, MixLoraConfig
from moe_peft.adapters.lora import FFN_PROJECTIONS, PROJECTIONS
from moe_peft.config import AdapterJob
from moe_peft.data.dispatcher import StepPlan
from moe_peft.model.llama import ACTIVATION_CHECKPOINTING
from moe_peft.training.adapter_run import AdapterRun

ROOT = Path(__file__).resolve().parent.parent.parent
LINES = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
MODES = ["none", "selective", "full"]  # as the page's columns stand
AROUND = "once, around the layers"


def table(*header: str) -> list[list[str]]:
    """The rows of the page's one table with this header, code marks aside."""
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in LINES]
    (start,) = [i for i, row in enumerate(rows) if row == list(header)]
    end = next(i for i in range(start, len(rows)) if not rows[i])
    return rows[start + 2 : end]


def value(formula: str, sizes: dict[str, int]) -> int:
    """A formula of the page, in which factors stand side by side."""
    tokens = re.findall(r"KV|[A-Za-z]|\d+|[-+()]", formula)
    assert "".join(tokens) == formula.replace(" ", ""), formula
    text = ""
    for before, token in zip(["(", *tokens], tokens, strict=False):
        text += "*" * (before not in "-+(" and token not in "-+)") + str(sizes.get(token, token))
    return eval(text)


TOTALS = {name: dict(zip(MODES, formulas, strict=True)) for name, *formulas in table("method", *MODES)}
TERMS = table("bytes", "tensor", "method", "kept with")
CHANGES = table("when", "bytes", "with")


def added(case: str, mode: str, sizes: dict[str, int]) -> int:
    """What the page adds in a case, of which ``case`` is a part of the description."""
    ((_, formula, modes),) = [row for row in CHANGES if case in row[0]]
    return value(formula, sizes) if mode in modes.split(", ") else 0


def method_of(adapter: LoraConfig) -> str:
    return "MixLoRA" if isinstance(adapter, MixLoraConfig) else "LoRA"


def sizes_of(config: LlamaConfig, adapter: LoraConfig, dtype: torch.dtype) -> dict[str, int]:
    """The page's letters."""
    heads, groups, size = config.num_attention_heads, config.num_kv_heads, config.head_size
    sizes = {"e": dtype.itemsize, "D": config.hidden_size, "F": config.intermediate_size, "r": adapter.r}
    sizes |= {"H": heads, "G": groups, "d": size, "Q": heads * size, "KV": groups * size}
    if isinstance(adapter, MixLoraConfig):
        sizes |= {"E": adapter.num_experts, "K": adapter.top_k}
    return sizes


def kept_bytes(config, adapter, dtype, mode, length, num_adapters=1, device="cpu") -> int:
    """Bytes of distinct storages, weights aside, that autograd saves in a forward of 3 * length tokens an adapter."""
    model = tiny_model(config, dtype=dtype).to(device).train()
    model.activation_checkpointing_ = mode
    runs = [Run(f"a{i}", random_samples((length, 2 * length), seed=i)) for i in range(num_adapters)]
    for run in runs:
        model.add_adapter(run.adapter_name, adapter)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)  # alive, so that no later storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = [output.loss + output.aux_loss for output in model(fuse(*runs))]
    assert all(loss.requires_grad for loss in losses)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(size for address, size in storages.items() if address not in weights)


def kept_by_layer(config, adapter, dtype, mode, device="cpu", lengths=(2, 5)) -> float:
    """What one more token costs in one more layer."""
    found = []
    for num_layers in (2, 3):
        deeper = replace(config, num_hidden_layers=num_layers)
        fewer, more = (kept_bytes(deeper, adapter, dtype, mode, length, device=device) for length in lengths)
        found.append((more - fewer) / (3 * (lengths[1] - lengths[0])))
    return found[1] - found[0]


SHAPES = {
    "grouped heads": tiny_config(),
    "a group for each head": tiny_config(num_key_value_heads=4, hidden_size=32, intermediate_size=20),
    "heads wider than the model": tiny_config(hidden_size=12, num_key_value_heads=1, head_dim=10),
}
ADAPTERS = {
    "LoRA 1": LoraConfig(r=1),
    "LoRA 3": LoraConfig(r=3),
    "LoRA 8": LoraConfig(r=8),
    "MixLoRA 5 top-2": MixLoraConfig(r=3, num_experts=5, top_k=2),
    "MixLoRA 3 top-3": MixLoraConfig(r=1, num_experts=3, top_k=3, router_aux_loss_type="balance_per_layer"),
    "MixLoRA 8 top-4": MixLoraConfig(r=8, num_experts=8, top_k=4, router_z_loss_coef=0.1),
}
LORA, MIXTURE = ADAPTERS["LoRA 3"], ADAPTERS["MixLoRA 5 top-2"]


def test_the_page_knows_every_mode():
    assert sorted(ACTIVATION_CHECKPOINTING) == sorted(MODES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_token_keeps_in_a_layer_what_the_page_says(config, adapter, dtype, mode):
    expected = value(TOTALS[method_of(adapter)][mode], sizes_of(config, adapter, dtype))
    assert kept_by_layer(config, adapter, dtype, mode) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_adapters", [1, 3])
@pytest.mark.parametrize("adapter", [LORA, MIXTURE], ids=method_of)
def test_a_token_keeps_in_a_whole_model_what_the_page_says(adapter, num_adapters, mode):
    config, dtype = SHAPES["grouped heads"], torch.bfloat16
    sizes = sizes_of(config, adapter, dtype)
    fewer, more = (kept_bytes(config, adapter, dtype, mode, length, num_adapters) for length in (3, 7))
    of_layers = config.num_hidden_layers * value(TOTALS[method_of(adapter)][mode], sizes)
    assert more - fewer == num_adapters * 3 * (7 - 3) * (of_layers + value(TOTALS[AROUND][mode], sizes))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", [LORA, MIXTURE], ids=method_of)
def test_a_layer_keeps_nothing_that_does_not_grow_with_the_tokens(adapter, mode):
    config, dtype = SHAPES["grouped heads"], torch.bfloat16
    shallow, deep = (
        kept_bytes(replace(config, num_hidden_layers=layers), adapter, dtype, mode, 5) for layers in (1, 2)
    )
    of_tokens = value(TOTALS[method_of(adapter)][mode], sizes_of(config, adapter, dtype))
    assert deep - shallow == 3 * 5 * of_tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_the_terms_add_up_to_the_totals(adapter, mode):
    sizes = sizes_of(SHAPES["heads wider than the model"], adapter, torch.bfloat16)
    method = method_of(adapter)
    own = [row[0] for row in TERMS if row[2] in ("both", method) and mode in row[3].split(", ")]
    assert sum(value(formula, sizes) for formula in own) == value(TOTALS[method][mode], sizes)


CASES = {
    "lora_dropout": [replace(LORA, lora_dropout=0.1), replace(MIXTURE, lora_dropout=0.1)],
    "top_k: 1": [replace(MIXTURE, top_k=1)],
    "router_jitter_noise": [replace(MIXTURE, router_jitter_noise=0.1)],
    "a norm on queries and keys": [LORA, MIXTURE],
}
# Held by tests of their own.
OTHER_CASES = {"carries no LoRA |", "carries no experts", "beside that", "Triton kernels", "flash attention"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["balance_per_layer", "cv2"])
def test_the_kind_of_the_balance_loss_changes_nothing_for_a_token(kind, mode):
    config, dtype = SHAPES["grouped heads"], torch.bfloat16
    as_is, other = (
        [kept_bytes(config, adapter, dtype, mode, length) for length in (3, 7)]
        for adapter in (MIXTURE, replace(MIXTURE, router_aux_loss_type=kind))
    )
    assert other[1] - other[0] == as_is[1] - as_is[0]


def test_every_case_is_tested():
    found = Counter(case for row in CHANGES for case in {*CASES, *OTHER_CASES} if case in f"{row[0]} |")
    assert found == Counter({*CASES, *OTHER_CASES})
    assert len(CHANGES) == len(found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("case", "adapter"), [(case, adapter) for case, adapters in CASES.items() for adapter in adapters]
)
def test_what_a_case_adds(case, adapter, dtype, mode):
    config = replace(SHAPES["grouped heads"], qk_norm=case == "a norm on queries and keys")
    sizes = sizes_of(config, adapter, dtype)
    expected = value(TOTALS[method_of(adapter)][mode], sizes) + added(case, mode, sizes)
    assert kept_by_layer(config, adapter, dtype, mode) == expected


SUBSETS = [
    replace(adapter, target_modules=targets)
    for adapter, targets in [
        (LORA, ("q_proj", "v_proj")),
        (LORA, ("down_proj",)),
        (LORA, PROJECTIONS[:4]),
        (LORA, ("o_proj", "up_proj")),
        (MIXTURE, ("down_proj",)),
        (MIXTURE, ("q_proj", "gate_proj")),
        (MIXTURE, ("o_proj", "up_proj", "gate_proj")),
    ]
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", SUBSETS, ids=lambda adapter: f"{method_of(adapter)} {adapter.target_modules}")
def test_what_projections_without_a_low_rank_product_leave_out(adapter, mode):
    is_mixture = method_of(adapter) == "MixLoRA"
    sizes = sizes_of(SHAPES["grouped heads"], adapter, torch.bfloat16)
    expected = value(TOTALS[method_of(adapter)][mode], sizes)
    for name in set(PROJECTIONS) - set(adapter.targets):
        has_experts = is_mixture and name in FFN_PROJECTIONS
        expected += added("carries no experts" if has_experts else "a projection carries no LoRA", mode, sizes)
        expected += added("beside that", mode, sizes) if name == "o_proj" else 0
    assert kept_by_layer(SHAPES["grouped heads"], adapter, torch.bfloat16, mode) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
@pytest.mark.parametrize("adapter", [LORA, MIXTURE, replace(MIXTURE, top_k=1)], ids=["LoRA", "top-2", "top-1"])
def test_what_kernels_keep(adapter, monkeypatch):
    """Every Triton kernel of the model in place of its reference, interpreted."""
    for name in ("rms_norm", "swiglu", "rotary", "lora_linear", "mixlora_ffn", "linear_cross_entropy"):
        monkeypatch.setattr(importlib.import_module(f"moe_peft.kernels.{name}.op"), "runs_kernel", lambda x: True)
    config, dtype = SHAPES["grouped heads"], torch.float32
    sizes = sizes_of(config, adapter, dtype)
    expected = value(TOTALS[method_of(adapter)]["none"], sizes)
    if method_of(adapter) == "MixLoRA":
        expected += added("Triton kernels", "none", sizes) + (adapter.top_k == 1) * added("top_k: 1", "none", sizes)
    assert kept_by_layer(config, adapter, dtype, "none", lengths=(1, 2)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", [LORA, MIXTURE], ids=method_of)
def test_what_a_gpu_keeps(adapter, mode):
    config, dtype = tiny_config(hidden_size=32), torch.bfloat16  # heads of 8 features, which flash attention takes
    sizes = sizes_of(config, adapter, dtype)
    expected = value(TOTALS[method_of(adapter)][mode], sizes) + added("flash attention", mode, sizes)
    if method_of(adapter) == "MixLoRA":
        expected += added("Triton kernels", mode, sizes)
    assert kept_by_layer(config, adapter, dtype, mode, device="cuda") == expected


def test_megabytes_of_real_models(smollm2):
    spec = importlib.util.spec_from_file_location("presets", ROOT / "benchmarks" / "presets.py")
    assert spec is not None
    assert spec.loader is not None
    presets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(presets)
    configs = {"smollm2-135m": smollm2[0].config_, **presets.SHAPES}
    adapters = {"LoRA": LoraConfig(r=8), "MixLoRA": MixLoraConfig(r=8, num_experts=8, top_k=2)}
    rows = table("model", "layers", "method", *MODES)
    assert {row[0] for row in rows} == {"smollm2-135m", "tinyllama-1.1b", "llama-7b"}
    for model, layers, method, *cells in rows:
        config = configs[model]
        sizes = sizes_of(config, adapters[method], torch.bfloat16)
        assert int(layers) == config.num_hidden_layers
        for mode, cell in zip(MODES, cells, strict=True):
            expected = int(layers) * value(TOTALS[method][mode], sizes) + value(TOTALS[AROUND][mode], sizes)
            assert cell == f"{1000 * expected / 10**6:.1f}", (model, method, mode)


@pytest.mark.parametrize("settings", [{"optimizer": "adamw"}, {"optimizer": "sgd", "momentum": 0.9}], ids=str)
@pytest.mark.parametrize("adapter", [LORA, MIXTURE], ids=method_of)
def test_what_a_trainable_weight_costs(adapter, settings):
    """Float32 numbers beside the base model's bf16, for the adapter that is trained and nothing else."""
    weight_bytes, gradient_bytes, state_bytes, good_bytes = (int(row[0]) for row in table("bytes", "what"))
    if settings["optimizer"] == "sgd":
        (state_bytes,) = map(int, re.findall(r"SGD: `(\d+)` with momentum", " ".join(LINES)))
    model = tiny_model(dtype=torch.bfloat16).train()
    for name in ("qa", "other"):
        model.add_adapter(name, adapter)
    job = AdapterJob(name="qa", method=method_of(adapter).lower(), adapter=adapter, data="x.jsonl", lr=0.1, **settings)
    plan = StepPlan("qa", (), batch_size=1, micro_batch_size=1, num_epochs=1, max_steps=1, seed=0)
    run = AdapterRun(job, model, plan=plan, train_set=None, eval_set=None)
    _, found = run_step(model, Run("qa", random_samples((4, 5))))
    gradients = found["qa"].values()
    own = model.adapter_parameters("qa")
    for weight in own:
        weight.grad = torch.zeros_like(weight)
    run.optimizer.step()

    def size(tensors) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    numbers = sum(weight.numel() for weight in own)
    assert size(own) == weight_bytes * numbers
    assert size(gradients) == gradient_bytes * numbers
    moments = [value for of_weight in run.optimizer.state.values() for value in of_weight.values()]
    assert size(tensor for tensor in moments if tensor.dim()) == state_bytes * numbers
    assert {id(weight) for weight in run.optimizer.state} == {id(weight) for weight in own}
    lists = [tensors for name, tensors in vars(run).items() if isinstance(tensors, list) and name != "parameters"]
    assert sum(size(tensors) for tensors in lists) == good_bytes * numbers
    assert all(weight.grad is None for name, weight in model.named_parameters() if id(weight) not in set(map(id, own)))
