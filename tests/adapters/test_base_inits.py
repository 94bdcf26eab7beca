"""PiSSA and OLoRA: as the real peft, which changes the base that is shared here; saved as LoRA of twice the rank."""

import contextlib
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import (
    add_random_adapter,
    assert_close,
    assert_relative,
    random_run,
    randomize,
    run_step,
    tiny_config,
    tiny_model,
)
from peft_pair import (
    assert_same_step,
    base_pair,
    copy_weights,
    our_logits,
    their_logits,
    their_weights,
    with_peft,
)
from safetensors.torch import load_file

from moe_peft import DoraConfig, LlamaForCausalLM, LoraConfig, load_adapter, save_adapter
from moe_peft.adapters.base_inits import alpha_at_rank, factors_of_base
from moe_peft.adapters.lora import PROJECTIONS
from moe_peft.io.base_model import without_memory
from moe_peft.model.draws import generator_for

CASES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa", "r": 4},
    "olora": {"init_lora_weights": "olora", "r": 4},
    "olora-largest": {"init_lora_weights": "olora", "r": 12, "target_modules": ["k_proj", "up_proj"]},
    "pissa-rslora": {"init_lora_weights": "pissa", "r": 3, "lora_alpha": 5, "use_rslora": True},
    "olora-rslora": {"init_lora_weights": "olora", "r": 5, "lora_alpha": 2, "use_rslora": True},
    "pissa-patterns": {
        "init_lora_weights": "pissa",
        "r": 3,
        "rank_pattern": {r".*1\.mlp.*": 5, "q_proj": 2},
        "alpha_pattern": {"v_proj": 3.5},
        "layers_to_transform": (0, 1),
    },
    "olora-rslora-patterns": {
        "init_lora_weights": "olora",
        "r": 3,
        "use_rslora": True,
        "rank_pattern": {"mlp.down_proj": 7},
        "alpha_pattern": {r".*0.*proj": 3.5},
    },
    "iterated": {"init_lora_weights": "pissa_niter_3", "r": 4, "lora_alpha": 6},
}


def spelled_out(settings: dict[str, Any]) -> dict[str, Any]:
    layers = settings.get("layers_to_transform")
    out = {"lora_alpha": 16, "target_modules": list(PROJECTIONS), **settings}
    return {**out, "layers_to_transform": list(layers)} if layers else out


@contextlib.contextmanager
def our_draws(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> Iterator[None]:
    """What ``torch.svd_lowrank`` draws for the layers in turn is what ours draws for them."""
    paths = iter((layer, projection) for layer in range(3) for projection in PROJECTIONS)

    def randn(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        generator = generator_for(7, "qa", "init", *next(paths))
        return torch.empty(shape, dtype=dtype).normal_(generator=generator)

    with monkeypatch.context() as patch:
        if "niter" in settings["init_lora_weights"]:
            patch.setattr(torch, "randn", randn)
        yield


def pair(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, config: type[LoraConfig] = LoraConfig) -> Any:
    hf, model = base_pair("llama-biased")
    model.add_adapter("qa", config(**settings), seed=7)
    with our_draws(monkeypatch, settings):
        theirs = with_peft(hf, **spelled_out(settings), use_dora=config is DoraConfig)
    return theirs, model


@pytest.mark.parametrize("case", CASES)
def test_it_starts_from_pefts_product_on_the_base_as_it_was(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, model = pair(CASES[case], monkeypatch)
    ours, live = model.adapter_state("qa"), their_weights(theirs)
    assert ours.keys() == live.keys()
    for key in (key for key in ours if "lora_A" in key):
        key_b = key.replace("lora_A", "lora_B")
        assert ours[key].shape == live[key].shape
        assert_relative(ours[key_b] @ ours[key], live[key_b] @ live[key], 1e-5, key)
    assert_close(our_logits(model, "qa"), our_logits(model, ""), 1e-5, "before a step it is the base model")
    assert_close(our_logits(model, "qa"), their_logits(theirs), 1e-4)


@pytest.mark.parametrize("config", [LoraConfig, DoraConfig])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_pefts(case: str, config: type[LoraConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """After both have gone the same way from the start."""
    theirs, model = pair(CASES[case], monkeypatch, config)
    state, live = model.adapter_state("qa"), their_weights(theirs)
    copy_weights(live, state)  # signs of singular vectors may differ
    for layer in model.layers:  # and the initial factors are what the adapter started with
        for linear in (*layer.self_attn.children(), *layer.mlp.children()):
            lora = getattr(linear, "loras_", {}).get("qa")
            if lora is not None:
                lora.initial_a_.copy_(lora.lora_A.detach())
                lora.initial_b_.copy_(lora.lora_B.detach())
    moved = {key: torch.empty_like(weight) for key, weight in state.items()}
    randomize(moved, seed=3, std=0.1)
    with torch.no_grad():
        for key, weight in state.items():
            weight.add_(moved[key])
    copy_weights(state, live)
    assert_same_step(theirs, model, "qa", 2e-4)
    gradients = model.adapter_gradients("qa")
    assert gradients.keys() == state.keys(), "what it started from gets none"


@pytest.mark.parametrize("config", [LoraConfig, DoraConfig])
@pytest.mark.parametrize("case", CASES)
def test_it_is_saved_as_plain_lora_of_twice_the_rank(case: str, config: type[LoraConfig], tmp_path: Path) -> None:
    hf, model = base_pair()
    settings = CASES[case]
    model.add_adapter("qa", config(**settings), seed=7)
    shake(model, "qa")
    save_adapter(model, "qa", tmp_path / "qa")
    fields = json.loads((tmp_path / "qa" / "adapter_config.json").read_text())
    assert (fields["init_lora_weights"], fields["r"]) == (True, 2 * settings["r"])
    theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path / "qa")).eval()
    assert_close(our_logits(model, "qa"), their_logits(theirs), 1e-4)
    assert (our_logits(model, "qa") - our_logits(model, "")).abs().max() > 1e-2

    load_adapter(model, tmp_path / "qa", "plain")
    assert type(model.adapter_config("plain")) is config
    assert torch.equal(our_logits(model, "qa"), our_logits(model, "plain"))
    for layer in model.layers:
        for linear in (*layer.self_attn.children(), *layer.mlp.children()):
            loras = getattr(linear, "loras_", {})
            if "qa" in loras:
                ours, plain = loras["qa"], loras["plain"]
                peft_layer = theirs.base_model.model.model.layers[linear.layer_idx_].get_submodule(
                    ("self_attn." if linear in set(layer.self_attn.children()) else "mlp.") + name_of(layer, linear)
                )
                assert ours.scaling_ == plain.scaling_ == peft_layer.scaling["default"], "to the bit"


def name_of(layer: Any, linear: Any) -> str:
    return next(
        name for part in (layer.self_attn, layer.mlp) for name, module in part.named_children() if module is linear
    )


def shake(model: LlamaForCausalLM, name: str) -> None:
    """Move every weight a little from where it started."""
    state = model.adapter_state(name)
    moved = {key: torch.empty_like(weight) for key, weight in state.items()}
    randomize(moved, seed=5, std=0.1)
    for key, weight in state.items():
        weight.add_(moved[key])


def test_pefts_own_conversion_is_the_same(tmp_path: Path) -> None:
    """Its ``path_initial_model_for_weight_conversion``, of the same adapter, gives our tensors and settings."""
    settings = {"r": 3, "lora_alpha": 6, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}}
    hf, model = base_pair()
    theirs = with_peft(hf, **spelled_out(settings))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "initial"))
    theirs.peft_config["default"].init_lora_weights = "pissa"
    live = their_weights(theirs)
    moved = {key: torch.empty_like(weight) for key, weight in live.items()}
    randomize(moved, seed=5, std=0.1)
    with torch.no_grad():
        for key, weight in live.items():
            weight.add_(moved[key])
    theirs.save_pretrained(str(tmp_path / "raw"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it loads a second adapter beside this one, and warns of that
        theirs.save_pretrained(
            str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    load_adapter(model, tmp_path / "raw", "qa")  # its init is computed again, as PEFT does it
    save_adapter(model, "qa", tmp_path / "ours")
    expected, found = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours"))
    assert expected.keys() == found.keys()
    for key in (key for key in expected if "lora_A" in key):
        key_b = key.replace("lora_A", "lora_B")
        assert found[key].shape == expected[key].shape
        assert_close(found[key_b] @ found[key], expected[key_b] @ expected[key], 1e-5, key)
    their_fields, our_fields = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("theirs", "ours")
    )
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora"):
        assert our_fields[field] == their_fields[field], field


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA"])
def test_a_folder_that_peft_saved_without_conversion(init: str, tmp_path: Path) -> None:
    settings = spelled_out({"r": 3, "init_lora_weights": init, "use_rslora": True})
    hf, model = base_pair()
    theirs = with_peft(hf, **settings)
    live = their_weights(theirs)
    moved = {key: torch.empty_like(weight) for key, weight in live.items()}
    randomize(moved, seed=5, std=0.1)
    with torch.no_grad():
        for key, weight in live.items():
            weight.add_(moved[key])
    theirs.save_pretrained(str(tmp_path / "qa"))
    load_adapter(model, tmp_path / "qa", "qa")
    assert model.adapter_config("qa").init_lora_weights == init.lower()
    assert_close(our_logits(model, "qa"), their_logits(theirs), 1e-4)
    for key, weight in model.adapter_state("qa").items():
        assert torch.equal(weight, live[key].detach()), key
    hf, _ = base_pair()
    again = peft.PeftModel.from_pretrained(hf, str(tmp_path / "qa")).eval()
    assert_close(our_logits(model, "qa"), their_logits(again), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 19), (19, 7)], ids=str)
def test_the_decompositions_are_what_they_are_called(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Against a full decomposition in float64 of the weight as its dtype holds it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    wide, scaling, r = weight.double(), 1.7, 3
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    best = (u[:, :r] * s[:r]) @ vh[:r]
    for init in ("pissa", "pissa_niter_200"):
        a, b = factors_of_base(weight, r, scaling, init, torch.Generator().manual_seed(1))
        assert (a.dtype, b.dtype) == ((torch.float64,) * 2 if dtype == torch.float64 else (torch.float32,) * 2)
        assert_close(scaling * (b.double() @ a.double()), best, max(tolerance, 1e-11), init)
        assert_close((a.double() ** 2).sum(1), s[:r] / scaling, 10 * tolerance, "each factor has a root of each value")
        assert_close((b.double() ** 2).sum(0), s[:r] / scaling, 10 * tolerance)
    a, b = factors_of_base(weight, r, scaling, "olora", torch.Generator())
    q, upper = torch.linalg.qr(wide)
    assert_close(b.double() @ a.double(), q[:, :r] @ upper[:r], tolerance)
    assert_close(b.double().T @ b.double(), torch.eye(r, dtype=torch.float64), tolerance)


def test_few_rounds_are_an_approximation_of_our_own_draws() -> None:
    """Nearer with each round, the same for the same key, and nothing of the global generator's."""
    weight = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    a, b = factors_of_base(weight, 4, 1.0, "pissa", torch.Generator())
    errors = []
    for rounds in (0, 1, 4):
        state = torch.get_rng_state()
        close_a, close_b = factors_of_base(weight, 4, 1.0, f"pissa_niter_{rounds}", generator_for(1, "qa"))
        assert torch.equal(torch.get_rng_state(), state)
        again = factors_of_base(weight, 4, 1.0, f"pissa_niter_{rounds}", generator_for(1, "qa"))
        assert torch.equal(close_a, again[0])
        errors.append((close_b @ close_a - b @ a).norm().item())
    assert errors[0] > errors[1] > errors[2] > 0


def test_in_bfloat16_the_base_stays_and_factors_are_float32(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    model.add_adapter("qa", LoraConfig(r=4, init_lora_weights="pissa"))
    assert all(torch.equal(model.state_dict()[key], weight) for key, weight in before.items())
    assert {weight.dtype for weight in model.adapter_state("qa").values()} == {torch.float32}
    assert {buffer.dtype for buffer in model.adapter_buffers("qa").values()} == {torch.float32}
    assert len(model.adapter_buffers("qa")) == len(model.adapter_state("qa"))
    shake(model, "qa")
    save_adapter(model, "qa", tmp_path / "qa")
    load_adapter(model, tmp_path / "qa", "plain")
    assert torch.equal(our_logits(model, "qa"), our_logits(model, "plain"))


def test_neighbours_change_nothing() -> None:
    model = tiny_model(tiny_config()).train()
    names = {"a": LoraConfig(r=3, init_lora_weights="pissa", lora_dropout=0.2), "b": LoraConfig(r=5, lora_dropout=0.1)}
    names["c"] = DoraConfig(r=2, init_lora_weights="olora", lora_dropout=0.1)
    runs = []
    for seed, (name, config) in enumerate(names.items()):
        model.add_adapter(name, config, seed=seed)
        shake(model, name)
        runs.append(random_run(name, (5, 3), seed=seed))
    outputs, found = run_step(model, *runs, random_run("", (4,)))
    for run, output in zip(runs, outputs, strict=False):
        (alone,), solo = run_step(model, run)
        assert_close(output.logits, alone.logits, 1e-5, run.adapter_name)
        for key, gradient in solo[run.adapter_name].items():
            assert_close(found[run.adapter_name][key], gradient, 1e-5, key)


def test_scales_of_twice_the_rank() -> None:
    """At every power of four the same to the bit, elsewhere within a rounding."""
    for r in range(1, 129):
        for alpha in (1.0, 3.0, 7.5, 16.0, 100.0):
            scaling = alpha / math.sqrt(r)
            found = alpha_at_rank(scaling, 2 * r) / math.sqrt(2 * r)
            assert abs(found - scaling) <= math.ulp(scaling)
            if math.sqrt(2 * r).is_integer() and (int(math.sqrt(2 * r)) & (int(math.sqrt(2 * r)) - 1)) == 0:
                assert found == scaling


def test_sizes_alone_take_no_decomposition() -> None:
    with without_memory():
        model = LlamaForCausalLM(tiny_config())
        model.add_adapter("qa", LoraConfig(r=4, init_lora_weights="pissa"))
        model.add_adapter("do", DoraConfig(r=4, init_lora_weights="olora"))
    assert {weight.device.type for name in ("qa", "do") for weight in model.adapter_state(name).values()} == {"meta"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pisa"}, "init_lora_weights='pisa' must be true, false or .*; did you mean 'pissa'"),
        ({"init_lora_weights": "pissa_niter_"}, "init_lora_weights='pissa_niter_' must be true, false or"),
        ({"init_lora_weights": "pissa_niter_-1"}, "init_lora_weights='pissa_niter_-1' must be"),
        ({"init_lora_weights": "pissa_niter_99999"}, "init_lora_weights='pissa_niter_99999' must be"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' must be"),
    ],
    ids=str,
)
def test_unknown_inits_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_rank_above_the_weights_is_refused(init: str) -> None:
    model = tiny_model()
    message = r"r=13 must be at most 12, the smaller side of model\.layers\.0\.self_attn\.k_proj, for"
    with pytest.raises(ValueError, match=message):
        model.add_adapter("qa", LoraConfig(r=13, init_lora_weights=init))
    model.add_adapter("qa", LoraConfig(r=12, init_lora_weights=init))


def test_one_seed_gives_one_adapter_whatever_else_is_there() -> None:
    config = LoraConfig(r=3, init_lora_weights="pissa_niter_1")
    first, second = tiny_model(), tiny_model()
    add_random_adapter(second, "other", LoraConfig(r=2))
    torch.rand(3)
    for model in (first, second):
        model.add_adapter("qa", config, seed=5)
    first.add_adapter("qb", config, seed=6)
    for key, weight in first.adapter_state("qa").items():
        assert torch.equal(weight, second.adapter_state("qa")[key])
    assert any(
        not torch.equal(weight, first.adapter_state("qb")[key]) for key, weight in first.adapter_state("qa").items()
    )
