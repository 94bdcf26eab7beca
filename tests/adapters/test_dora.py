"""DoRA: against the real peft, and against its formula in float64."""

import json
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from builders import (
    Run,
    add_random_adapter,
    assert_close,
    assert_relative,
    fuse,
    random_run,
    randomize,
    run_step,
    tiny_config,
    tiny_model,
)
from hf_twin import hf_model
from peft_pair import (
    SIZES,
    assert_same_step,
    base_pair,
    copy_weights,
    our_logits,
    their_logits,
    their_weights,
    with_peft,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_peft import DoraConfig, LoraConfig, load_adapter, save_adapter
from moe_peft.adapters.dora import Dora
from moe_peft.adapters.lora import PROJECTIONS
from moe_peft.generation import Request, generate_tokens
from moe_peft.io.adapter_files import read_adapter_config

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "rank one": {"r": 1},
    "rslora": {"r": 5, "lora_alpha": 3, "use_rslora": True},
    "some": {"r": 3, "target_modules": ["k_proj", "o_proj", "down_proj"]},
}


def spelled_out(settings: dict[str, Any]) -> dict[str, Any]:
    return {"lora_alpha": 16, "target_modules": list(PROJECTIONS), "use_dora": True, **settings}


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-biased"])
@pytest.mark.parametrize("case", SETTINGS)
def test_logits_and_gradients_equal_pefts(case: str, family: str) -> None:
    """Of the magnitudes, too, and past the biases of q, k and v."""
    hf, model = base_pair(family)
    add_random_adapter(model, "qa", DoraConfig(**SETTINGS[case]), seed=4)
    theirs = with_peft(hf, **spelled_out(SETTINGS[case]))
    copy_weights(model.adapter_state("qa"), their_weights(theirs))
    assert_same_step(theirs, model, "qa")


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_magnitudes_start_as_the_lengths_of_the_rows(init: bool | str) -> None:
    """As peft's; and an adapter whose product is zero changes no bit of the base model."""
    hf, model = base_pair()
    model.add_adapter("qa", DoraConfig(r=3, init_lora_weights=init))
    theirs = with_peft(hf, **spelled_out({"r": 3, "init_lora_weights": init}))
    state, live = model.adapter_state("qa"), their_weights(theirs)
    assert state.keys() == live.keys()
    if init is False:
        layers = theirs.base_model.model.model.layers
        for key in [key for key in state if key.endswith("vector")]:
            prefix = key.removesuffix(".lora_magnitude_vector")
            _, layer, room = prefix.removeprefix("base_model.model.model.").split(".", 2)
            weight = layers[int(layer)].get_submodule(room).base_layer.weight
            product = state[f"{prefix}.lora_B.weight"] @ state[f"{prefix}.lora_A.weight"]
            assert_relative(state[key], (weight + 16 / 3 * product).norm(dim=1), 1e-5, key)
        return
    for key in (key for key in state if key.endswith("vector")):
        assert_relative(state[key], live[key], 1e-6, key)
    assert torch.equal(our_logits(model, "qa"), our_logits(model, ""))


@pytest.mark.parametrize("case", SETTINGS)
def test_folders_go_both_ways(case: str, tmp_path: Path) -> None:
    hf, model = base_pair("qwen2")
    theirs = with_peft(hf, **spelled_out(SETTINGS[case]))
    live = their_weights(theirs)
    moved = {key: torch.empty_like(weight) for key, weight in live.items()}
    randomize(moved, seed=5, std=0.2)
    with torch.no_grad():
        for key, weight in live.items():
            weight.add_(moved[key])
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert (
        any(key.endswith("q_proj.lora_magnitude_vector") for key in weights_in(tmp_path / "theirs")) or case == "some"
    )
    load_adapter(model, tmp_path / "theirs", "qa")
    assert type(model.adapter_config("qa")) is DoraConfig
    assert_close(our_logits(model, "qa"), their_logits(theirs), 1e-4)
    assert (our_logits(model, "qa") - our_logits(model, "")).abs().max() > 1e-2

    save_adapter(model, "qa", tmp_path / "ours")
    assert weights_in(tmp_path / "ours").keys() == weights_in(tmp_path / "theirs").keys()
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["use_dora"]) == ("LORA", True)
    hf, _ = base_pair("qwen2")
    again = peft.PeftModel.from_pretrained(hf, str(tmp_path / "ours")).eval()
    assert_close(our_logits(model, "qa"), their_logits(again), 1e-4)


def weights_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("value", [False, None])
def test_without_use_dora_a_folder_is_loras(value: object, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "use_dora": value}))
    assert type(read_adapter_config(tmp_path)) is LoraConfig


def test_an_odd_use_dora_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "use_dora": "yes"}))
    with pytest.raises(ValueError, match="use_dora='yes' must be true or false"):
        read_adapter_config(tmp_path)


class Setting:
    """A projection with a bias, DoRA on it, an input, and a loss, in float64."""

    def __init__(self, seed: int = 0, *, scaling: float = 1.75, outputs: int = 2050) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.base = nn.Linear(6, outputs, dtype=torch.float64).requires_grad_(False)
        self.base.weight.copy_(torch.randn(outputs, 6, generator=draw, dtype=torch.float64))
        self.base.bias.copy_(torch.randn(outputs, generator=draw, dtype=torch.float64))
        self.a = torch.randn(3, 6, generator=draw, dtype=torch.float64)
        self.b = torch.randn(outputs, 3, generator=draw, dtype=torch.float64)
        self.x = torch.randn(5, 6, generator=draw, dtype=torch.float64)
        self.dropped = torch.randn(5, 6, generator=draw, dtype=torch.float64)  # what the low-rank product sees
        self.dy = torch.randn(5, outputs, generator=draw, dtype=torch.float64)
        self.scaling = scaling
        self.dora = Dora(
            self.a.clone(), self.b.clone(), self.base.weight, scaling=scaling, dropout=0.0, seed=0, is_shifted=False
        )
        with torch.no_grad():
            self.dora.lora_magnitude_vector.copy_(torch.rand(outputs, generator=draw, dtype=torch.float64) + 0.5)


def test_the_formula_and_its_gradients_in_float64() -> None:
    """``y = m (W x + s B A x') / ||W + s B A|| + b``, the length a constant; x' is x with dropout."""
    own = Setting()
    a, b = (weight.clone().requires_grad_() for weight in (own.a, own.b))
    m = own.dora.lora_magnitude_vector.detach().clone().requires_grad_()
    lengths = (own.base.weight + own.scaling * b @ a).norm(dim=1).detach()
    x, dropped = own.x.clone().requires_grad_(), own.dropped.clone().requires_grad_()
    expected = (m / lengths) * (x @ own.base.weight.T + own.scaling * dropped @ a.T @ b.T) + own.base.bias
    expected.backward(own.dy)

    our_x, our_dropped = own.x.clone().requires_grad_(), own.dropped.clone().requires_grad_()
    lora_a, lora_b = own.dora.low_rank()
    before = own.base(our_x) + own.scaling * our_dropped @ lora_a.T @ lora_b.T
    found = own.dora.behind(before, own.base)
    found.backward(own.dy)
    assert_relative(found, expected, 1e-12, "y")
    pairs = [(own.dora.lora_A, a), (own.dora.lora_B, b), (own.dora.lora_magnitude_vector, m)]
    for ours, theirs in [*pairs, (our_x, x), (our_dropped, dropped)]:
        assert_relative(ours.grad, theirs.grad, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lengths_of_rows_without_the_rows(dtype: torch.dtype) -> None:
    """In every dtype of the base as exact as float32 is, for large and small updates."""
    for scale in (0.0, 1e-3, 1.0, 30.0):
        own = Setting()
        weight = own.base.weight.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        dora = Dora(own.a.to(wide), scale * own.b.to(wide), weight, scaling=1.75, dropout=0.0, seed=0, is_shifted=False)
        expected = (weight.double() + 1.75 * dora.lora_B.double() @ dora.lora_A.double()).norm(dim=1)
        assert dora.row_norms(weight).dtype == wide
        assert_relative(dora.row_norms(weight), expected, 1e-12 if dtype == torch.float64 else 1e-6)


def test_a_row_of_zeros_stays_one() -> None:
    own = Setting(outputs=4)
    own.base.weight[1].zero_()
    dora = Dora(own.a, torch.zeros_like(own.b), own.base.weight, scaling=2.0, dropout=0.0, seed=0, is_shifted=False)
    found = dora.behind(own.base(own.x), own.base)
    assert torch.equal(found[:, 1], own.base.bias[1].expand(5))
    assert_close(found, own.base(own.x), 1e-14)
    found.backward(own.dy)
    assert dora.lora_magnitude_vector.grad.isfinite().all()


@pytest.mark.parametrize("fields", [{}, {"init_lora_weights": "pissa"}, {"rank_pattern": {"q_proj": 5}}], ids=str)
def test_merged_it_computes_the_same(fields: dict[str, Any]) -> None:
    model = tiny_model(tiny_config(attention_bias=True, mlp_bias=True), dtype=torch.float64)
    add_random_adapter(model, "qa", DoraConfig(r=3, **fields))
    before = our_logits(model, "qa")
    model.merge_adapter("qa")
    assert_close(our_logits(model, "qa"), before, 1e-11)
    model.unmerge_adapter("qa")
    assert torch.equal(our_logits(model, "qa"), before)


def test_on_a_bfloat16_base_ratios_are_not_rounded() -> None:
    """1.006 is 1.0078 in bfloat16, in every token alike: it is applied wide, and only what comes out is rounded."""
    model = tiny_model(dtype=torch.bfloat16)
    model.add_adapter("qa", DoraConfig(r=2))
    assert {weight.dtype for weight in model.adapter_state("qa").values()} == {torch.float32}
    linear = model.layers[0].mlp.up_proj
    dora = linear.loras_["qa"]
    y = torch.randn(400, linear.out_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(dora.behind(y, linear.base_layer_), y)
    dora.lora_magnitude_vector.data.mul_(1.006)
    found = dora.behind(y, linear.base_layer_)
    assert found.dtype == torch.bfloat16
    assert_relative((found.double() / y.double()).mean(), torch.tensor(1.006), 3e-4)


def test_dropout_leaves_the_frozen_product_whole() -> None:
    """With B zero there is no low-rank product, so dropping its input changes nothing; with B there, it does."""
    model = tiny_model().train()
    model.add_adapter("qa", DoraConfig(r=3, lora_dropout=0.5))
    for key, weight in model.adapter_state("qa").items():
        if key.endswith("vector"):
            weight.mul_(1.5)
    run = random_run("qa", (6, 4))
    trained = run_step(model, run)[0][0].logits
    assert torch.equal(trained, run_step(model.eval(), run)[0][0].logits)
    randomize({key: weight for key, weight in model.adapter_state("qa").items() if "lora_B" in key}, 3, 0.2)
    trained = run_step(model.train(), run)[0][0].logits
    assert (trained - run_step(model.eval(), run)[0][0].logits).abs().max() > 1e-3


def test_on_few_labels_only_what_they_need_is_computed() -> None:
    model = tiny_model().train()
    add_random_adapter(model, "qa", DoraConfig(r=3, lora_dropout=0.2))
    run = random_run("qa", (6, 4))
    (narrow,) = model(fuse(run))
    (full,) = model(fuse(run), return_logits=True)
    assert_close(narrow.loss, full.loss, 1e-6)


def test_an_adapter_of_the_default_settings_is_pefts_own_default() -> None:
    """What peft saves untouched loads and computes the base model."""
    hf = hf_model("llama", SIZES)
    theirs = with_peft(hf, **spelled_out({"r": 8}))
    _, model = base_pair()
    model.add_adapter("qa", DoraConfig())
    assert {key: weight.shape for key, weight in their_weights(theirs).items()} == {
        key: weight.shape for key, weight in model.adapter_state("qa").items()
    }


def test_while_an_answer_is_generated_lengths_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again for the next answer, whatever way weights were changed in between."""
    model = tiny_model()
    add_random_adapter(model, "qa", DoraConfig(r=3, target_modules=["q_proj"]))
    calls = []
    real = Dora.row_norms
    monkeypatch.setattr(Dora, "row_norms", lambda dora, weight: calls.append(1) or real(dora, weight))

    def answer() -> tuple[int, ...]:
        request = Request(prompt_ids=(5, 6, 7), adapter_name="qa", max_new_tokens=6)
        (completion,) = generate_tokens(model, NoText(), [request])
        return completion.token_ids

    def greedy() -> tuple[int, ...]:
        ids = [5, 6, 7]
        for _ in range(6):
            (output,) = model(fuse(Run("qa", [ids]), with_labels=False))
            ids.append(int(output.logits[-1].argmax()))
        return tuple(ids[3:])

    first = answer()
    assert len(calls) == 2  # one for each layer
    assert tuple(first) == greedy()
    for layer in model.layers:
        layer.self_attn.q_proj.loras_["qa"].lora_B.data.mul_(-9)
    assert tuple(answer()) == greedy()


class NoText:
    """A tokenizer for answers of which only the ids are asked for."""

    eos_token_ids = ()
    special_ids: ClassVar[dict[str, int]] = {}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return ""
