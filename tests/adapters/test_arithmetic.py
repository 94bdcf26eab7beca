"""Combined adapters equal those of the real peft's ``add_weighted_adapter``, or a plain float64 formula."""

import peft
import pytest
import torch
from builders import Run, add_random_adapter, assert_close, fuse, random_samples, tiny_model
from hf_twin import hf_model, twin_of

from moe_peft import AdaLoraConfig, LlamaConfig, LoraConfig, MixLoraConfig, combine_adapters, load_adapter, save_adapter
from moe_peft.adapters import METHODS, arithmetic
from moe_peft.adapters.arithmetic import COMBINATION_TYPES, kept_at_random
from moe_peft.adapters.lora import PROJECTIONS
from moe_peft.model.linear import Linear

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}
SAMPLES = random_samples((9, 4, 6))
SAME_RANK = {
    "first": {"r": 4, "lora_alpha": 6},
    "second": {"r": 4, "lora_alpha": 9, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "third": {"r": 4, "lora_alpha": 2, "target_modules": ["v_proj", "up_proj"]},
}
OTHER_RANKS = {
    "first": {"r": 2, "lora_alpha": 6},
    "second": {"r": 5, "lora_alpha": 9, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "third": {"r": 3, "lora_alpha": 2, "target_modules": ["v_proj", "up_proj"]},
}
WEIGHTS = (0.7, -1.3, 2.0)
DENSE = [kind for kind in COMBINATION_TYPES if kind not in ("linear", "cat", "svd")]
RANDOM = [kind for kind in DENSE if kind.startswith("dare")]
OF_FACTORS = [kind for kind in COMBINATION_TYPES if kind != "cat" and not kind.endswith("svd")]


def make_pair(settings):
    """A peft model and ours that carry the same random adapters."""
    hf = hf_model("llama", SIZES)
    model = twin_of(hf, LlamaConfig(**SIZES))
    theirs = None
    for i, (name, own) in enumerate(settings.items()):
        add_random_adapter(model, name, LoraConfig(**own), seed=10 + 2 * i)
        config = peft.LoraConfig(**{"target_modules": list(PROJECTIONS), **own})
        if theirs is None:
            theirs = peft.get_peft_model(hf, config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        state = model.adapter_state(name)
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                if f".{name}." in key:
                    parameter.copy_(state[key.replace(f".{name}.", ".")])
    return theirs, model


def their_deltas(theirs, name):
    """By path of the projection, what the adapter adds to its weight."""
    found = {}
    for path, module in theirs.named_modules():
        if name in getattr(module, "lora_A", {}):
            pair = module.lora_B[name].weight.double() @ module.lora_A[name].weight.double()
            found[path[path.index("layers.") :]] = pair.detach() * module.scaling[name]
    return found


def our_deltas(model, name):
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear) and name in module.loras_:
            lora = module.loras_[name]
            if lora.low_rank() is None:
                continue
            lora_a, lora_b = (factor.detach().double() for factor in lora.low_rank())
            found[path] = lora.scaling_ * lora_b @ lora_a
    return found


def assert_same_deltas(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    assert any(delta.abs().max() > 1e-2 for delta in expected.values())
    for path, delta in expected.items():
        assert_close(actual[path], delta, tolerance, path)


def arguments_of(kind):
    return {"density": 0.6} if kind in DENSE else {}


CASES = [
    (kind, settings, signs)
    for kind in COMBINATION_TYPES
    if kind not in RANDOM
    for settings in (SAME_RANK, *(() if kind in OF_FACTORS else (OTHER_RANKS,)))
    for signs in ("total", *(("frequency",) if "ties" in kind else ()))
]


@pytest.mark.parametrize(("kind", "settings", "signs"), CASES)
def test_combinations_equal_pefts(kind, settings, signs):
    theirs, model = make_pair(settings)
    arguments = {**arguments_of(kind), **({"majority_sign_method": signs} if "ties" in kind else {})}
    if kind.endswith("svd"):
        arguments["svd_rank"] = 3
    combine_adapters(model, list(settings), WEIGHTS, "new", combination_type=kind, **arguments)
    theirs.add_weighted_adapter(list(settings), list(WEIGHTS), "new", combination_type=kind, **arguments)
    assert_same_deltas(our_deltas(model, "new"), their_deltas(theirs, "new"))
    theirs.set_adapter("new")
    (output,) = model(fuse(Run("new", SAMPLES), with_labels=False))
    expected = torch.cat([theirs(torch.tensor([sample])).logits[0] for sample in SAMPLES])
    assert_close(output.logits, expected, 1e-4, "logits")


@pytest.mark.parametrize("kind", RANDOM)
def test_dare_equals_pefts_formula_under_the_same_masks(kind, monkeypatch):
    theirs, model = make_pair(SAME_RANK)
    masks, draw = [], kept_at_random
    monkeypatch.setattr(arithmetic, "kept_at_random", lambda *arguments: masks.append(draw(*arguments)) or masks[-1])
    combine_adapters(model, list(SAME_RANK), WEIGHTS, "new", combination_type=kind, density=0.6)
    left = list(masks)

    def same_mask(probabilities):
        assert torch.equal(probabilities, torch.full_like(probabilities, 0.6))
        return left.pop(0)

    monkeypatch.setattr(torch, "bernoulli", same_mask)
    order = theirs_order(theirs)
    monkeypatch.setattr(type(theirs.base_model.model), "named_modules", order)
    theirs.add_weighted_adapter(list(SAME_RANK), list(WEIGHTS), "new", combination_type=kind, density=0.6)
    assert left == []
    assert_same_deltas(our_deltas(model, "new"), their_deltas(theirs, "new"))


def theirs_order(theirs):
    """Their modules in the order in which ours are visited, which is that of the masks."""
    model = theirs.base_model.model
    modules = list(model.named_modules())
    paths = [f"layers.{i}.{room}.{name}" for i in range(2) for name in PROJECTIONS for room in ("self_attn", "mlp")]
    rank = {path: i for i, path in enumerate(paths)}
    modules.sort(key=lambda item: rank.get(item[0].removeprefix("model."), -1))
    return lambda self, *_, **__: iter(modules)


def test_what_dare_drops_is_random_keyed_and_made_up_for():
    values = torch.full((200, 300), 2.0)
    mask = kept_at_random(values, 0.3, (0, "new", "lora_A", 0))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(mask.mean() - 0.3) < 5 * (0.3 * 0.7 / mask.numel()) ** 0.5
    columns = mask.mean(dim=0)
    assert abs(columns.std() - (0.3 * 0.7 / 200) ** 0.5) < 0.004
    assert torch.equal(mask, kept_at_random(values, 0.3, (0, "new", "lora_A", 0)))
    other = kept_at_random(values, 0.3, (0, "new", "lora_A", 1))
    assert abs((mask * other).mean() - 0.09) < 0.01
    assert kept_at_random(values, 1.0, (0,)).all()


def test_dare_is_a_function_of_its_seed_and_right_on_average():
    model = tiny_model()
    for i, name in enumerate("ab"):
        add_random_adapter(model, name, LoraConfig(r=3, target_modules=["v_proj"]), seed=2 * i)

    def combined(seed):
        combine_adapters(
            model,
            ["a", "b"],
            [1.0, -0.5],
            "new",
            combination_type="dare_linear_svd",
            density=0.5,
            svd_rank=12,
            seed=seed,
        )
        delta = our_deltas(model, "new")["layers.1.self_attn.v_proj"]
        model.remove_adapter("new")
        return delta

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = combined(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(combined(0), first)
    assert not torch.allclose(combined(1), first)
    parts = [our_deltas(model, name)["layers.1.self_attn.v_proj"] for name in "ab"]
    exact = parts[0] - 0.5 * parts[1]
    mean = sum(combined(seed) for seed in range(200)) / 200
    assert (mean - exact).norm() < 0.15 * exact.norm()


def test_cat_is_the_weighted_sum_in_float64():
    model = tiny_model(dtype=torch.float64)
    add_random_adapter(model, "a", LoraConfig(r=2, lora_alpha=5), seed=1)
    add_random_adapter(model, "b", LoraConfig(r=3, use_rslora=True, target_modules=["q_proj"]), seed=2)
    combine_adapters(model, ["a", "b"], [0.3, -2.0], "new", combination_type="cat")
    new = our_deltas(model, "new")
    assert model.adapter_config("new").r == 5
    assert model.adapter_config("new").scaling == 1
    a, b = our_deltas(model, "a"), our_deltas(model, "b")
    for path, delta in a.items():
        assert_close(new[path], 0.3 * delta - 2.0 * b[path] if path in b else 0.3 * delta, 1e-14, path)


def test_svd_is_exact_at_full_rank_and_nearest_below_it():
    model = tiny_model(dtype=torch.float64)
    add_random_adapter(model, "a", LoraConfig(r=2), seed=1)
    add_random_adapter(model, "b", LoraConfig(r=3), seed=2)
    combine_adapters(model, ["a", "b"], [1.0, 0.5], "whole", svd_rank=24)
    combine_adapters(model, ["a", "b"], [1.0, 0.5], "cut")
    combine_adapters(model, ["b"], [1.0], "one", svd_rank=1)
    assert [model.adapter_config(name).r for name in ("whole", "cut", "one")] == [24, 3, 1]
    a, b = our_deltas(model, "a"), our_deltas(model, "b")
    deltas = {name: our_deltas(model, name) for name in ("whole", "cut", "one")}
    for path in a:
        total = a[path] + 0.5 * b[path]
        assert_close(deltas["whole"][path], total, 1e-12, path)
        for name, whole, rank in (("cut", total, 3), ("one", b[path], 1)):
            u, s, vh = torch.linalg.svd(whole)
            assert_close(deltas[name][path], u[:, :rank] * s[:rank] @ vh[:rank], 1e-11, path)


@pytest.mark.parametrize("method", METHODS)
def test_every_low_rank_method_takes_part_and_every_other_is_refused(method):
    model = tiny_model()
    add_random_adapter(model, "a", METHODS[method](), seed=1)
    add_random_adapter(model, "b", LoraConfig(r=3), seed=2)
    try:
        combine_adapters(model, ["a", "b"], [0.5, 1.0], "new", combination_type="cat")
    except ValueError as error:
        assert method != "lora"
        assert str(error).startswith("adapter 'a' cannot be combined: ")
        assert type(model.adapter_config("a")).__name__ in str(error)
        assert model.adapter_names == ["a", "b"]
        return
    new, a, b = (our_deltas(model, name) for name in ("new", "a", "b"))
    assert_same_deltas(new, {path: 0.5 * a.get(path, 0) + b[path] for path in b})


def test_a_projection_without_any_rank_left_adds_nothing(tmp_path):
    """A pruned AdaLoRA, saved and loaded; alone it gives what it has elsewhere, and with no rank at all it is named."""
    model = tiny_model()
    add_random_adapter(model, "full", AdaLoraConfig(init_r=3, target_r=2), seed=1)
    add_random_adapter(model, "b", LoraConfig(r=3, target_modules=["q_proj", "k_proj"]), seed=2)
    for name, marks in {"a": ("0.self_attn.q_proj", "1.mlp.down_proj"), "none": ("",)}.items():
        for key, mask in model.adapter_buffers("full").items():
            if any(mark in key for mark in marks):
                mask.fill_(False)
                model.adapter_state("full")[key.replace("rank_mask", "lora_E")].zero_()
        save_adapter(model, "full", tmp_path / name)
        load_adapter(model, tmp_path / name)
    for names, weights in ((["a", "b"], [0.5, 1.0]), (["a"], [0.5])):
        for kind in ("cat", "svd"):
            combine_adapters(model, names, weights, "new", combination_type=kind, svd_rank=9 if kind == "svd" else None)
            new, a, b = (our_deltas(model, name) for name in ("new", "a", "b"))
            assert len(a) == len(new) - 2
            parts = {path: [0.5 * a[path]] if path in a else [] for path in new}
            for path in b if "b" in names else ():
                parts[path].append(b[path])
            assert_same_deltas(new, {path: sum(own, torch.zeros_like(new[path])) for path, own in parts.items()})
            model.remove_adapter("new")
    with pytest.raises(ValueError, match=r"names=\['none'\]: none of these adapters changes a projection"):
        combine_adapters(model, ["none"], [1.0], "new", combination_type="cat")


def test_the_result_is_a_lora_like_any_other(tmp_path):
    model = tiny_model()
    add_random_adapter(model, "a", LoraConfig(r=2), seed=1)
    add_random_adapter(model, "b", LoraConfig(r=2, target_modules=["k_proj"]), seed=2)
    combine_adapters(model, ["a", "b"], [1.0, 1.0], "new", combination_type="ties", density=1.0)
    save_adapter(model, "new", tmp_path / "new")
    load_adapter(model, tmp_path / "new", "again")
    first, second = model(fuse(Run("new", SAMPLES), Run("again", SAMPLES), with_labels=False))
    assert_close(second.logits, first.logits, 1e-6)
    model.train()
    (output,) = model(fuse(Run("new", SAMPLES)))
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in model.adapter_gradients("new").values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": []}, r"names=\[\] must be a list of at least one adapter"),
        ({"names": "ab"}, r"names='ab' must be a list"),
        ({"names": ["a", "a"]}, r"names=\['a', 'a'\] has an adapter twice"),
        ({"names": ["a", "bb"]}, r"adapter 'bb' is not attached to this model; did you mean 'b'\?"),
        (
            {"names": ["a", "mix"]},
            r"adapter 'mix' cannot be combined: MixLoraConfig keeps something in layers\.0\.mlp\.moes_",
        ),
        ({"weights": [1.0]}, "weights has 1 entries for 2 names: give one each"),
        ({"names": {"a", "b"}}, r"names=\{.*\} must be a list"),
        ({"names": 5}, "names=5 must be a list"),
        ({"names": [["a"], "b"]}, r"names\[0\]=\['a'\] must be str, not list"),
        ({"weights": [1.0, float("nan")]}, r"weights\[1\]=nan must be a finite number"),
        ({"weights": ["1", 1.0]}, r"weights\[0\]='1' must be float, not str"),
        ({"weights": [1.0, None]}, r"weights\[1\]=None must be float, not null"),
        ({"weights": None}, "weights=None must be a list of numbers"),
        ({"weights": 1.0}, "weights=1.0 must be a list of numbers"),
        ({"name": None}, "adapter name None must consist of letters"),
        ({"seed": "x"}, "seed='x' must be int, not str"),
        ({"name": "a"}, "adapter name 'a' is taken already"),
        ({"combination_type": "liner"}, r"combination_type='liner' must be one of .*; did you mean 'linear'\?"),
        ({"combination_type": "linear"}, "needs adapters of one rank, but theirs are a: 2, b: 3"),
        ({"combination_type": "ties"}, r"density=None must be in \(0, 1\] for combination_type='ties'"),
        ({"combination_type": "dare_ties", "density": 0.0}, r"density=0\.0 must be in \(0, 1\]"),
        ({"combination_type": "ties_svd", "density": 1.5}, r"density=1\.5 must be in \(0, 1\]"),
        ({"density": 0.5}, "density=0.5 has no meaning for combination_type='svd'"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "totl"}, "did you mean 'total'"),
        ({"majority_sign_method": "frequency"}, "majority_sign_method='frequency' has no meaning for"),
        ({"combination_type": "cat", "svd_rank": 2}, "svd_rank=2 has no meaning for combination_type='cat'"),
        ({"svd_rank": 0}, "svd_rank=0 must be at least 1"),
        ({"svd_rank": 1.5}, r"svd_rank=1\.5 must be int \| null, not float"),
        ({"svd_rank": True}, r"svd_rank=True must be int \| null, not bool"),
        ({"svd_rank": float("nan")}, r"svd_rank=nan must be int \| null"),
        ({"svd_rank": 10**12}, "svd_rank=1000000000000 must be at most 24"),
        ({"combination_type": "ties_svd", "density": "x"}, r"density='x' must be float \| null"),
        ({"weights": [1e300, 2.0]}, r"weights=\[1e\+300, 2\.0\] are too large for torch\.float32: values at layer 0's"),
        ({"weights": [1e300, 1e300], "combination_type": "cat"}, "are too large for torch.float32"),
        ({"weights": [1e300, 1e300], "combination_type": "ties_svd", "density": 0.5}, "are too large for torch.float"),
    ],
)
def test_mistakes_are_named_and_attach_nothing(changes, message):
    model = tiny_model()
    add_random_adapter(model, "a", LoraConfig(r=2), seed=1)
    add_random_adapter(model, "b", LoraConfig(r=3), seed=2)
    model.add_adapter("mix", MixLoraConfig(num_experts=2))
    fields = {"names": ["a", "b"], "weights": [1.0, 1.0], "name": "new", **changes}
    with pytest.raises(ValueError, match=message):
        combine_adapters(model, **fields)
    assert model.adapter_names == ["a", "b", "mix"]


@pytest.mark.parametrize("kind", ["svd", "cat", "linear", "ties_svd"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_not_passed_on(kind, value):
    model = tiny_model()
    for seed, name in enumerate("ab"):
        add_random_adapter(model, name, LoraConfig(r=2), seed=seed)
    next(reversed(model.adapter_state("b").values()))[0, 0] = value
    density = {"density": 0.5} if kind.startswith("ties") else {}
    with pytest.raises(ValueError, match=r"adapter 'b' cannot be combined: its weights at layer .* are not finite"):
        combine_adapters(model, ["a", "b"], [1.0, 1.0], "new", combination_type=kind, **density)
    assert model.adapter_names == ["a", "b"]


def test_nothing_is_combined_on_a_merged_base():
    model = tiny_model()
    add_random_adapter(model, "a", LoraConfig(r=2), seed=1)
    model.merge_adapter("a")
    with pytest.raises(ValueError, match="adapter 'new' belongs beside the plain base model, but 'a' is merged"):
        combine_adapters(model, ["a"], [1.0], "new", combination_type="linear")
