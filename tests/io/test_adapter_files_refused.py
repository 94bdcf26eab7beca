"""Adapter folders that must be refused, by name and with nothing attached."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from builders import add_random_adapter, tiny_config, tiny_model
from hf_twin import hf_model
from safetensors.torch import load_file, save_file

from moe_peft import LlamaForCausalLM, LoraConfig, MixLoraConfig, load_adapter, save_adapter
from moe_peft.adapters import METHODS
from moe_peft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """One for all tests: what is refused leaves no trace on it."""
    return tiny_model()


@pytest.fixture(params=["lora", "mixlora"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A good adapter folder for ``model``."""
    configs = {"lora": LoraConfig(r=2), "mixlora": MixLoraConfig(r=2, num_experts=3)}
    source = tiny_model()
    add_random_adapter(source, "qa", configs[request.param])
    save_adapter(source, "qa", tmp_path / "qa")
    return tmp_path / "qa"


def trace(model: LlamaForCausalLM) -> tuple[list[str], list[str]]:
    """Everything that attaching an adapter changes."""
    return model.adapter_names, [name for name, _ in model.named_modules()]


def refused(model: LlamaForCausalLM, folder: Path, *words: str) -> str:
    """Loading must raise a ValueError of one line with these words, and attach nothing."""
    before = trace(model)
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder, "new")
    assert trace(model) == before
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def change_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    change(weights)
    save_file(weights, folder / WEIGHTS_FILE)


def test_the_good_folder_loads(model: LlamaForCausalLM, folder: Path) -> None:
    before = trace(model)
    assert load_adapter(model, folder) == "qa"
    model.remove_adapter("qa")
    assert trace(model) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("exclude_modules", ["q_proj"]),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [3]),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("use_qalora", True),
        ("a_field_of_next_year", 1),
    ],
)
def test_a_field_that_changes_the_result_is_refused_by_name(
    field: str, value: object, model: LlamaForCausalLM, folder: Path
) -> None:
    change_config(folder, **{field: value})
    refused(model, folder, CONFIG_FILE, f"{field}={value!r} changes the adapter and is not supported for")


@pytest.mark.parametrize("folder", ["mixlora"], indirect=True)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4.0}),
        ("layers_to_transform", [1]),
        ("layers_to_transform", 0),
    ],
)
def test_a_mixture_refuses_what_lora_does(field: str, value: object, model: LlamaForCausalLM, folder: Path) -> None:
    change_config(folder, **{field: value})
    refused(model, folder, CONFIG_FILE, f"{field}={value!r} changes the adapter and is not supported for MIXLORA")


@pytest.mark.parametrize("folder", ["mixlora"], indirect=True)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_a_mixture_starts_from_no_base(init: str, model: LlamaForCausalLM, folder: Path) -> None:
    change_config(folder, init_lora_weights=init)
    refused(model, folder, f"init_lora_weights={init!r} was trained against a changed base model")


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga", "pissa_niter_x", "mystery"])
def test_an_init_that_changes_the_base_is_refused(init: str, model: LlamaForCausalLM, folder: Path) -> None:
    change_config(folder, init_lora_weights=init)
    refused(model, folder, f"init_lora_weights={init!r} was trained against a changed base model")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_init_that_leaves_the_base_alone_is_none_of_our_business(
    init: object, model: LlamaForCausalLM, folder: Path
) -> None:
    change_config(folder, init_lora_weights=init)
    load_adapter(model, folder, "new")
    model.remove_adapter("new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORAA"}, "peft_type='LORAA' must be one of LORA, MIXLORA, "),
        ({"peft_type": "LORAA"}, "; did you mean 'LORA'?"),
        ({"peft_type": "MONARCH"}, "peft_type='MONARCH' must be one of"),
        ({"peft_type": None}, "peft_type=None must be one of"),
        ({"peft_type": ["LORA"]}, "peft_type=['LORA'] must be one of"),
        ({"r": 0}, "r=0 must be at least 1"),
        ({"r": "8"}, "r='8' must be int, not str"),
        ({"r": 2.0}, "r=2.0 must be int, not float"),
        ({"r": None}, "r=None must be int, not null"),
        ({"lora_alpha": "x"}, "lora_alpha='x' must be float"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be"),
        ({"lora_dropout": 1}, "lora_dropout=1.0 must be in [0, 1)"),
        ({"use_rslora": "yes"}, "use_rslora='yes' must be bool"),
        ({"target_modules": []}, "target_modules=() must be"),
        ({"target_modules": ["q_prj", "up_proj"]}, "target_modules has 'q_prj'"),
        ({"target_modules": ["lm_head", "up_proj"]}, "target_modules has 'lm_head'"),
        ({"target_modules": r".*\.(q|up)_proj"}, "target_modules="),
        ({"target_modules": 7}, "target_modules=7 must be"),
        ({"target_modules": [7, {}]}, "target_modules[0]=7 must be str"),
    ],
    ids=repr,
)
def test_a_wrong_value_is_refused_with_its_rule(
    changes: dict, message: str, model: LlamaForCausalLM, folder: Path
) -> None:
    change_config(folder, **changes)
    refused(model, folder, CONFIG_FILE, message)


def test_what_peft_itself_saves_of_unsupported_kinds_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    settings = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 38, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    kinds = {
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "bias": {"bias": "all"},
    }
    for name, changes in kinds.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **changes)
        peft.get_peft_model(hf_model("llama", settings), config).save_pretrained(str(tmp_path / name))
        refused(model, tmp_path / name, f"{name}=")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"peft_type": "LORA",', "not valid JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b"{}", "peft_type=None must be one of"),
    ],
    ids=["empty", "cut", "list", "null", "binary", "deep", "nothing"],
)
def test_a_broken_config_file(content: bytes, words: str, model: LlamaForCausalLM, folder: Path) -> None:
    (folder / CONFIG_FILE).write_bytes(content)
    refused(model, folder, CONFIG_FILE, words)


def test_missing_files(model: LlamaForCausalLM, folder: Path) -> None:
    refused(model, folder.with_name("nothing"), "there is no adapter folder", "nothing")
    refused(model, folder / CONFIG_FILE, "there is no adapter folder")
    (folder / WEIGHTS_FILE).unlink()
    refused(model, folder, f"qa has no {WEIGHTS_FILE}")
    (folder / CONFIG_FILE).unlink()
    refused(model, folder, f"qa has no {CONFIG_FILE}")


class Bomb:
    """Unpickling it would call ``Path.touch`` on its path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_executed(model: LlamaForCausalLM, folder: Path) -> None:
    for protocol in (2, 5):
        for bomb in (Bomb(folder / "exploded"), {"lora": Bomb(folder / "exploded")}):
            (folder / "adapter_model.bin").write_bytes(pickle.dumps(bomb, protocol=protocol))
            (folder / WEIGHTS_FILE).unlink(missing_ok=True)
            refused(model, folder, "adapter_model.bin is damaged, or holds more than weights, and is not opened")
    torch.save({"lora": Bomb(folder / "exploded")}, folder / "adapter_model.bin")
    refused(model, folder, "adapter_model.bin is damaged, or holds more than weights, and is not opened")
    # Nor under the name of a safetensors file.
    (folder / "adapter_model.bin").rename(folder / WEIGHTS_FILE)
    refused(model, folder, "is truncated or corrupted")
    assert not (folder / "exploded").exists()


def test_every_cut_of_the_weights_is_refused(model: LlamaForCausalLM, folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(model, folder, WEIGHTS_FILE, "is truncated or corrupted")
    path.write_bytes(whole + b"\0")
    refused(model, folder, "is truncated or corrupted")


def test_damage_in_the_header_is_refused_or_harmless(model: LlamaForCausalLM, folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    whole = path.read_bytes()
    good = load_file(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load_adapter(model, folder, "new")
        except ValueError as error:
            num_refused += 1
            assert WEIGHTS_FILE in str(error)
            assert "new" not in model.adapter_names
            continue
        # Only the file's free-form metadata may be touched unnoticed.
        assert all(torch.equal(weight, good[key]) for key, weight in model.adapter_state("new").items())
        model.remove_adapter("new")
    assert num_refused > 130


def test_weights_that_do_not_belong_to_the_config(model: LlamaForCausalLM, folder: Path) -> None:
    original = (folder / WEIGHTS_FILE).read_bytes()
    key = sorted(load_file(folder / WEIGHTS_FILE))[0]
    for change, words in [
        (lambda weights: weights.pop(key), (f"lacks {key}", "1 missing, 0 unexpected")),
        (lambda weights: weights.update(extra=torch.zeros(1)), ("has extra", "0 missing, 1 unexpected")),
        (lambda weights: weights.update({key: weights[key][:, :-1].contiguous()}), (f"{key} has shape",)),
        (lambda weights: weights.update({key: weights[key].flatten()}), (f"{key} has shape",)),
        (lambda weights: weights.update({key: weights[key].int()}), (f"{key} holds torch.int32",)),
        (dict.clear, ("lacks ",)),
    ]:
        change_weights(folder, change)
        refused(model, folder, WEIGHTS_FILE, *words)
        (folder / WEIGHTS_FILE).write_bytes(original)
    change_config(folder, r=5)
    refused(model, folder, WEIGHTS_FILE, "has shape [2, ", "needs [5, ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 32}, "has shape"),
        ({"num_hidden_layers": 1}, "unexpected tensors): was it trained on another base?"),
        ({"num_hidden_layers": 3}, "lacks"),
        ({"intermediate_size": 40}, "has shape"),
        ({"num_key_value_heads": 4}, "has shape"),
    ],
)
def test_an_adapter_of_another_base(changes: dict, words: str, folder: Path) -> None:
    refused(tiny_model(tiny_config(**changes)), folder, WEIGHTS_FILE, words)


def test_a_name_that_is_taken_or_bad_changes_nothing(model: LlamaForCausalLM, folder: Path) -> None:
    load_adapter(model, folder, "first")
    before = {key: weight.clone() for key, weight in model.adapter_state("first").items()}
    state = trace(model)
    for name, words in [
        ("first", "taken already"),
        ("a.b", "must consist of letters"),
        ("", "must consist of letters"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_adapter(model, folder, name)
    assert trace(model) == state
    assert all(torch.equal(weight, before[key]) for key, weight in model.adapter_state("first").items())
    model.remove_adapter("first")


def saved(method: str, folder: Path, **settings: object) -> Path:
    """A good folder of an adapter of any method."""
    source = tiny_model()
    add_random_adapter(source, "qa", METHODS[method](**settings))
    save_adapter(source, "qa", folder)
    return folder


@pytest.mark.parametrize(
    ("method", "settings", "changes", "words"),
    [
        ("lora", {"r": 2}, {"r": 60_000}, "has shape [2, 24], but this base needs [60000, 24]"),
        ("lora", {"r": 2}, {"rank_pattern": {"v_proj": 60_000}}, "has shape [2, 24], but this base needs [60000, 24]"),
        ("adalora", {"init_r": 2, "target_r": 1}, {"init_r": 60_000}, "needs [60000, 24]"),
        ("sparse_lora", {"r": 2}, {"r": 60_000}, "needs [60000, 24]"),
        ("hierarchical_lora", {"ranks": [2, 3]}, {"ranks": [2, 60_000]}, "needs [60000, 24]"),
        ("bottleneck", {"bottleneck_size": 2}, {"bottleneck_size": 60_000}, "needs [60000, 24]"),
    ],
)
def test_nothing_is_allocated_for_a_config_that_the_file_does_not_fit(
    method: str,
    settings: dict,
    changes: dict,
    words: str,
    model: LlamaForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = saved(method, tmp_path / "qa", **settings)
    change_config(folder, **changes)
    monkeypatch.setattr(model, "add_adapter", lambda *_, **__: pytest.fail("an adapter was made"))
    refused(model, folder, WEIGHTS_FILE, words)


def test_patterns_in_another_order_need_other_weights(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The first pattern that matches counts, although dictionaries in another order are equal."""
    pattern = {"q_proj": 3, ".*proj": 2}
    folder = saved("lora", tmp_path / "qa", rank_pattern=pattern)
    load_adapter(model, folder, "new")
    model.remove_adapter("new")
    change_config(folder, rank_pattern=dict(reversed(pattern.items())))
    refused(model, folder, "q_proj.lora_A.weight has shape [3, 24], but this base needs [2, 24]")


@pytest.mark.parametrize("method", ["lora", "adalora", "sparse_lora", "vera", "prompt_tuning"])
def test_weights_that_are_not_finite(method: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = saved(method, tmp_path / "qa")
    good = (folder / WEIGHTS_FILE).read_bytes()
    key = next(key for key, tensor in sorted(load_file(folder / WEIGHTS_FILE).items()) if tensor.is_floating_point())
    for value in (float("nan"), float("inf"), -float("inf"), 1e300):

        def spoil(weights: dict[str, torch.Tensor], value: float = value) -> None:
            weights[key] = weights[key].double()
            kept = weights[key].flatten().nonzero()[0]  # a sparse factor's masked entries are refused as such
            weights[key].view(-1)[kept] = value

        change_weights(folder, spoil)
        refused(model, folder, WEIGHTS_FILE, f"{key} must be finite, but holds NaN, or numbers beyond torch.float32")
        (folder / WEIGHTS_FILE).write_bytes(good)


def test_a_lora_that_calls_itself_quantized(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = saved("lora", tmp_path / "qa", r=2)
    change_config(folder, peft_type="QUANTIZED_LORA")
    refused(model, folder, ".lora_A.weight is not quantized: it must be ", ".lora_A.integers and ", ".lora_A.scales")


def test_singular_values_without_a_rank_and_masks(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = saved("adalora", tmp_path / "qa")
    good = (folder / WEIGHTS_FILE).read_bytes()
    key = next(key for key in load_file(folder / WEIGHTS_FILE) if key.endswith(".lora_E"))
    change_weights(folder, lambda weights: weights.update({key: torch.tensor(1.0)}))
    refused(model, folder, f"{key} has shape [], but must have [R, 1]")
    (folder / WEIGHTS_FILE).write_bytes(good)
    mask = key.replace(".lora_E", ".rank_mask")
    change_weights(folder, lambda weights: weights.update({mask: torch.zeros(12, dtype=torch.bool)}))
    refused(model, folder, f"{mask} must not be there")


@pytest.mark.parametrize("method", ["lora", "sparse_lora"])
@pytest.mark.parametrize("dtype", [torch.complex64, getattr(torch, "float4_e2m1fn_x2", torch.complex64)])
def test_numbers_that_are_no_weights(method: str, dtype: torch.dtype, model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = saved(method, tmp_path / "qa", r=2)
    key = next(key for key in load_file(folder / WEIGHTS_FILE) if key.endswith(".lora_A.weight"))

    def change(weights: dict[str, torch.Tensor]) -> None:
        shape = weights[key].shape
        weights[key] = (
            torch.zeros(shape, dtype=torch.uint8).view(dtype)
            if dtype.itemsize == 1
            else torch.zeros(shape, dtype=dtype)
        )

    change_weights(folder, change)
    refused(model, folder, f"{key} holds {dtype}, not floating-point weights")


def test_factors_of_eight_bits_load(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """What float8 holds is exact in float32; a mask beside it is still checked."""
    folder = saved("sparse_lora", tmp_path / "qa", r=2)

    def narrow(weights: dict[str, torch.Tensor]) -> None:
        for key in [key for key in weights if key.endswith(".weight")]:
            weights[key] = weights[key].to(torch.float8_e4m3fn)

    change_weights(folder, narrow)
    load_adapter(model, folder, "new")
    expected = load_file(folder / WEIGHTS_FILE)
    assert all(torch.equal(weight, expected[key].float()) for key, weight in model.adapter_state("new").items())
    model.remove_adapter("new")
    key = next(key for key in expected if key.endswith(".lora_A.weight"))
    change_weights(folder, lambda weights: weights.update({key: torch.ones_like(weights[key].float())}))
    refused(model, folder, "masks entries that are not zero in the factor")


@pytest.mark.parametrize("method", ["lora", "vera", "adalora"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers_to_transform": [[0]]}, "layers_to_transform[0]=[0] must be int, not list"),
        ({"layers_to_transform": [{}]}, "layers_to_transform[0]={} must be int, not mapping"),
        ({"layers_to_transform": [1, True]}, "layers_to_transform[1]=True must be int, not bool"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern='(' must be 'layers'"),
        ({"layers_to_transform": [0], "layers_pattern": r"(((\w|[a-z_.])+)+)+X"}, "must be 'layers'"),
    ],
)
def test_wrong_layers(method: str, changes: dict, words: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = saved(method, tmp_path / "qa")
    change_config(folder, **changes)
    refused(model, folder, CONFIG_FILE, words)
