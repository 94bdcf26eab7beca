"""AdaLoRA's outputs, penalty, gradients and folders equal those of the real peft."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import (
    Run,
    add_random_adapter,
    assert_close,
    backward,
    fuse,
    gradients,
    random_samples,
    randomize,
    tiny_model,
)
from hf_twin import hf_model, twin_of
from safetensors.torch import load_file

from moe_peft import AdaLoraConfig, LlamaConfig, LlamaForCausalLM, load_adapter, save_adapter
from moe_peft.adapters.lora import PROJECTIONS
from moe_peft.adapters.rank_allocator import AdaLora, RankAllocator

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}
SAMPLES = random_samples((9, 4, 1, 6))
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "one rank": {"init_r": 1, "target_r": 1, "target_modules": ["k_proj"]},
    "odd": {
        "init_r": 5,
        "target_r": 3,
        "lora_alpha": 7,
        "orth_reg_weight": 0.1,
        "target_modules": ["v_proj", "up_proj"],
    },
    "no penalty": {"init_r": 4, "orth_reg_weight": 0.0, "target_r": 4, "layers_to_transform": [1]},
}


def make_pair(settings: dict[str, Any]) -> tuple[peft.PeftModel, LlamaForCausalLM, dict[str, torch.nn.Parameter]]:
    """A peft model and ours that carry the same random adapter ``qa``."""
    hf = hf_model("llama", SIZES)
    model = twin_of(hf, LlamaConfig(**SIZES))
    add_random_adapter(model, "qa", AdaLoraConfig(**settings), seed=4)
    settings = {"lora_alpha": 16, "target_modules": list(PROJECTIONS), **settings}
    theirs = peft.get_peft_model(hf, peft.AdaLoraConfig(total_step=100, task_type="CAUSAL_LM", **settings)).eval()
    state = model.adapter_state("qa")
    live = {name.replace(".default", ""): weight for name, weight in theirs.named_parameters() if weight.requires_grad}
    assert live.keys() == state.keys()
    with torch.no_grad():
        for name, weight in live.items():
            weight.copy_(state[name])
    return theirs, model, live


def logits_of(theirs: peft.PeftModel) -> torch.Tensor:
    """Of every sample."""
    with torch.no_grad():
        return torch.cat([theirs(torch.tensor([sample])).logits[0] for sample in SAMPLES])


@pytest.mark.parametrize("case", SETTINGS)
def test_logits_loss_and_gradients_equal_pefts(case: str) -> None:
    theirs, model, live = make_pair(SETTINGS[case])
    expected = logits_of(theirs)
    count = sum(len(sample) - 1 for sample in SAMPLES)
    expected_loss = torch.zeros(())
    for sample in SAMPLES:
        if len(sample) > 1:
            ids = torch.tensor([sample])
            expected_loss = expected_loss + theirs(ids, labels=ids).loss * ((len(sample) - 1) / count)
    expected_loss.backward()
    (output,) = model.train()(fuse(Run("qa", SAMPLES)), return_logits=True)
    backward([output])
    assert_close(output.logits, expected, 1e-4, "logits")
    assert_close(output.loss + output.aux_loss, expected_loss, 1e-5, "loss with penalty")
    for name, gradient in gradients(model, "qa").items():
        assert live[name].grad.abs().max() > 0, name
        assert_close(gradient, live[name].grad, 1e-4, name)
    (plain,) = model(fuse(Run("", SAMPLES), with_labels=False))
    assert (plain.logits - expected).abs().max() > 1e-2  # the adapter acts


def test_the_penalty_belongs_to_a_loss() -> None:
    """There is none on a batch that is only to be answered."""
    _, model, _ = make_pair({})
    (answered,) = model(fuse(Run("qa", SAMPLES), with_labels=False))
    (learnt,) = model(fuse(Run("qa", SAMPLES)))
    assert answered.aux_loss == 0
    assert learnt.aux_loss > 0


def test_initial_weights_are_distributed_as_pefts() -> None:
    model = tiny_model(LlamaConfig(**{**SIZES, "hidden_size": 160}))
    model.add_adapter("qa", AdaLoraConfig())
    for name, weight in model.adapter_state("qa").items():
        assert weight.std().item() == (0.0 if "lora_E" in name else pytest.approx(0.02, rel=0.15)), name
        assert abs(weight.mean()) < 0.003, name


def prune(theirs: peft.PeftModel, keep: dict[str, list[int]]) -> None:
    """Have peft prune everything but these ranks of some projections, as the end of its training leaves it."""
    pattern = {}
    for name, weight in theirs.base_model.model.named_parameters():
        if "lora_E" in name:
            kept = next((ranks for part, ranks in keep.items() if part in name), range(len(weight)))
            pattern[name] = [rank in kept for rank in range(len(weight))]
            weight.data[~torch.tensor(pattern[name])] = 0.0
    theirs.peft_config["default"].rank_pattern = pattern


KEPT = {"0.self_attn.q_proj": [0, 3], "0.mlp.down_proj": [2], "1.mlp.gate_proj": [], "1.self_attn.v_proj": [1, 2, 3]}


def saved_by_peft(folder: Path, keep: dict[str, list[int]]) -> tuple[Path, torch.Tensor, LlamaForCausalLM]:
    """A folder of peft's, its logits, and a bare model for it."""
    hf = hf_model("llama", SIZES)
    model = twin_of(hf, LlamaConfig(**SIZES))
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=9, tfinal=2, target_modules=list(PROJECTIONS), lora_dropout=0.1
    )
    theirs = peft.get_peft_model(hf, config).eval()
    randomize({name: weight for name, weight in theirs.named_parameters() if weight.requires_grad}, 3)
    if keep:
        prune(theirs, keep)
    logits = logits_of(theirs)
    theirs.save_pretrained(folder)
    return folder, logits, model


# PEFT takes a projection without any rank for a fault.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize("keep", [{}, KEPT], ids=["whole", "pruned"])
def test_a_folder_of_pefts_is_read(keep: dict[str, list[int]], tmp_path: Path) -> None:
    folder, expected, model = saved_by_peft(tmp_path / "theirs", keep)
    load_adapter(model, folder, name="qa")
    (output,) = model(fuse(Run("qa", SAMPLES)), return_logits=True)
    assert_close(output.logits, expected, 1e-4, "logits")
    config = model.adapter_config("qa")
    assert (config.init_r, config.target_r, config.lora_alpha, config.total_step) == (4, 2, 6.0, 9)
    ranks = {key: weight.shape[0] for key, weight in model.adapter_state("qa").items() if key.endswith("lora_E")}
    for part, kept in keep.items():
        assert [rank for key, rank in ranks.items() if part in key] == [len(kept)]
    # Written again, it is the same.
    save_adapter(model, "qa", tmp_path / "ours")
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    settings = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "ours")]
    assert settings[0]["rank_pattern"] == settings[1]["rank_pattern"]


# PEFT says so of its own folders, too.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("keep", [{}, KEPT], ids=["whole", "pruned"])
def test_peft_reads_ours(keep: dict[str, list[int]], tmp_path: Path) -> None:
    """Masked ranks that are zero are pruned for real; one that has come back since its mask is not."""
    hf = hf_model("llama", SIZES)
    model = twin_of(hf, LlamaConfig(**SIZES))
    add_random_adapter(model, "qa", AdaLoraConfig(init_r=4, target_r=2, lora_alpha=5), seed=2)
    buffers, state = model.adapter_buffers("qa"), model.adapter_state("qa")
    for key in buffers:
        kept = next((ranks for part, ranks in keep.items() if part in key), range(4))
        buffers[key].copy_(torch.tensor([rank in kept for rank in range(4)]))
        state[key.replace("rank_mask", "lora_E")].masked_fill_(~buffers[key][:, None], 0.0)
    if keep:
        state["base_model.model.model.layers.0.self_attn.q_proj.lora_E"][1] = 0.3
    (expected,) = model(fuse(Run("qa", SAMPLES)), return_logits=True)
    save_adapter(model, "qa", tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path / "ours")).eval()
    assert_close(expected.logits, logits_of(theirs), 1e-4, "logits")
    if keep:
        sizes = {part: saved[f"base_model.model.model.layers.{part}.lora_A"].shape[0] for part in keep}
        assert sizes == {**{part: len(kept) for part, kept in keep.items()}, "0.self_attn.q_proj": 3}
    fresh = tiny_model(LlamaConfig(**SIZES))
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if "loras_" not in key})
    load_adapter(fresh, tmp_path / "ours", name="qa")
    (loaded,) = fresh(fuse(Run("qa", SAMPLES)), return_logits=True)
    assert_close(loaded.logits, expected.logits, 1e-6, "logits")


def test_merging_equals_the_forward() -> None:
    _, model, _ = make_pair({"init_r": 3, "target_r": 2})
    (before,) = model(fuse(Run("qa", SAMPLES)), return_logits=True)
    model.merge_adapter("qa")
    (merged,) = model(fuse(Run("qa", SAMPLES)), return_logits=True)
    assert_close(merged.logits, before.logits, 1e-4, "logits")


def allocate(scores: list[list[float]], target_r: int) -> list[list[bool]]:
    """Masks behind the last of two steps, of projections whose singular values alone have these importances."""
    loras = []
    for values in scores:
        size = len(values)
        lora = AdaLora(
            torch.zeros(size, 3), torch.ones(size, 1), torch.zeros(2, size), scaling=1.0, dropout=0.0, seed=0
        )
        loras.append(lora)
    allocator = RankAllocator(loras, target_r=target_r, tinit=0, tfinal=0, deltaT=5, beta1=0.5, beta2=0.5, total_step=2)
    for lora, values in zip(loras, scores, strict=True):
        lora.lora_E.grad = torch.tensor(values)[:, None]
    allocator.after_step(1)
    assert all(lora.rank_mask_.all() for lora in loras)  # no multiple of deltaT, and not the end
    allocator.after_step(2)
    return [lora.rank_mask_.tolist() for lora in loras]


def test_the_choice_is_over_all_projections() -> None:
    """A projection may lose all its ranks, another one none."""
    assert allocate([[5.0, 4.0, 6.0], [1.0, 2.0, 3.0]], 1) == [[True, False, True], [False] * 3]
    assert allocate([[5.0, 4.0, 6.0], [1.0, 2.0, 3.0]], 2) == [[True] * 3, [False, False, True]]
    assert allocate([[5.0, 4.0, 6.0], [1.0, 2.0, 3.0]], 3) == [[True] * 3] * 2


def test_of_equal_importances_at_the_threshold_none_stays() -> None:
    """As in PEFT, so that fewer ranks than the budget may be left."""
    assert allocate([[2.0, 2.0], [2.0, 3.0]], 1) == [[False, False], [False, True]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_r": 0}, "init_r=0 must be at least 1"),
        ({"target_r": 0}, "target_r=0 must be at least 1"),
        ({"target_r": 13}, "target_r=13 must be at most init_r=12"),
        ({"tinit": -1}, "tinit=-1 must be at least 0"),
        ({"tfinal": -1}, "tfinal=-1 must be at least 0"),
        ({"deltaT": 0}, "deltaT=0 must be at least 1"),
        ({"beta1": 1.0}, "beta1=1.0 must be between 0 and 1"),
        ({"beta2": 0.0}, "beta2=0.0 must be between 0 and 1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight=-0.1 must be at least 0"),
        ({"lora_alpha": 0}, "lora_alpha=0.0 must be above 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must be in \[0, 1\)"),
        ({"total_step": 9, "tinit": 4, "tfinal": 5}, "total_step=9 must be above tinit=4 plus tfinal=5"),
        ({"target_modules": ["q_pro"]}, "did you mean 'q_proj'"),
        ({"layers_to_transform": [1, 1]}, "names a layer twice"),
        ({"rank_pattern": {"x": [True]}}, r"rank_pattern\['x'\] has 1 entries, not init_r=12"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoraConfig(**settings)


def test_what_does_not_fit_the_model_or_the_run_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"names 'model.layers.0.mlp.q_proj.lora_E', which is no target; did you mean"):
        model.add_adapter("qa", AdaLoraConfig(rank_pattern={"model.layers.0.mlp.q_proj.lora_E": [True] * 12}))
    with pytest.raises(ValueError, match="layers_to_transform has 2"):
        model.add_adapter("qa", AdaLoraConfig(layers_to_transform=2))
    model.add_adapter("qa", AdaLoraConfig(tinit=3, tfinal=2))
    with pytest.raises(ValueError, match="tinit=3 plus tfinal=2 must be below the run's 5 optimizer steps"):
        model.adapter_config("qa").updates(model, "qa", 5)
    assert model.adapter_config("qa").updates(model, "qa", 6) is not None
    model.add_adapter("even", AdaLoraConfig(init_r=8, target_r=8))
    assert model.adapter_config("even").updates(model, "even", 1) is None  # there is nothing to prune
    config = AdaLoraConfig(total_step=7)
    with pytest.raises(ValueError, match="total_step=7 must be at most the run's 6 optimizer steps"):
        config.updates(model, "qa", 6)
