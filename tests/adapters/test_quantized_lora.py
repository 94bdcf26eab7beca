"""Quantized LoRA: equal to plain LoRA at the quantized factors; what a file holds of them is small, and exact."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import add_random_adapter, assert_close, random_run, run_step, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from naive_model import NaiveModel, assert_same_as_naive
from safetensors.torch import load_file, save_file

from moe_peft import LoraConfig, QuantizedLoraConfig, load_adapter, save_adapter
from moe_peft.adapters.lora import PROJECTIONS
from moe_peft.adapters.packed_bits import pack_bits, unpack_bits
from moe_peft.adapters.quantized_lora import fake_quantized, quantized

RUN = random_run("qa", (5, 1, 7), seed=3, step=2, micro_batch=1)
FLOAT32 = np.finfo(np.float32)


def to_bfloat16(value):
    """The nearest number with eight significant bits, of two the one whose last bit is zero."""
    if value == 0:
        return 0.0
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(fraction * 256), exponent - 8)


def naive_quantized(rows, bits, group_size):
    """One group after another in float64: the integers, each group's scale, and their products."""
    highest = 2 ** (bits - 1) - 1
    integers, acting = np.zeros(rows.shape), np.zeros(rows.shape)
    scales = np.zeros((rows.shape[0], math.ceil(rows.shape[1] / group_size)))
    for row in range(rows.shape[0]):
        for group in range(scales.shape[1]):
            own = slice(group * group_size, (group + 1) * group_size)
            scale = to_bfloat16(max(abs(value) for value in rows[row, own]) / highest)
            for column in range(own.start, min(own.stop, rows.shape[1])):
                integers[row, column] = round(rows[row, column] / scale) if scale else 0
            scales[row, group] = scale
            acting[row, own] = integers[row, own] * scale
    return integers, scales, acting


def by_rank(key, weight):
    return weight if "lora_A" in key else weight.T


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bits": 2, "group_size": 5, "r": 3, "lora_dropout": 0.3},
        {"bits": 8, "group_size": 99, "use_rslora": True},
    ],
    ids=str,
)
def test_equals_plain_lora_at_the_quantized_factors(settings):
    """Forward and every gradient: what plain LoRA gives its quantized factors goes straight through."""
    config = QuantizedLoraConfig(**settings)
    model = tiny_model(dtype=torch.float64).train()
    add_random_adapter(model, "qa", config, seed=5)
    naive = NaiveModel(model, "qa", config, seed=5)
    for key, weight in naive.weights.items():
        _, _, acting = naive_quantized(by_rank(key, weight.detach()).numpy(), config.bits, config.group_size)
        assert not np.allclose(acting, by_rank(key, weight.detach()), rtol=1e-3)
        naive.weights[key] = by_rank(key, torch.tensor(acting)).clone().requires_grad_()
    assert_same_as_naive(model, naive, RUN)


TINY, MAX = float(FLOAT32.tiny), float(FLOAT32.max)
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, TINY, 3e-38, 1.0, -1.0, 1e30, MAX, -MAX]
VALUES = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False, allow_infinity=False))


@given(st.data(), st.integers(2, 8), st.integers(1, 9))
def test_quantizing_again_changes_no_bit(data, bits, group_size):
    """Of zeros, of subnormal and of the largest numbers, too; and an integer is never far from its weight."""
    ranks, features = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 11))
    size = ranks * features
    weight = torch.tensor(data.draw(st.lists(VALUES, min_size=size, max_size=size)), dtype=torch.float32)
    weight = weight.view(ranks, features)
    integers, scales = quantized(weight, bits, group_size)
    acting = fake_quantized(weight, bits, group_size)
    assert acting.isfinite().all()
    again = quantized(acting, bits, group_size)
    assert torch.equal(again[0], integers)
    assert torch.equal(again[1], scales)
    assert torch.equal(fake_quantized(acting, bits, group_size).view(torch.int32), acting.view(torch.int32))
    highest = 2 ** (bits - 1) - 1
    assert integers.abs().max() <= highest
    assert torch.equal(integers, integers.round())
    assert torch.equal(scales, scales.bfloat16().float())
    assert ((scales == 0) | (scales >= TINY)).all()  # subnormal numbers have too few bits
    spread = scales.double().repeat_interleave(group_size, dim=1)[:, :features]
    exact = integers.double() * spread
    assert torch.equal(acting.double(), exact)  # the product of eight bits and eight bits
    error = (exact - weight.double()).abs()
    # Half a step; a group that is too small is zero, and one at the end of float32 is cut by the scale's rounding.
    largest = weight.double().abs().max()
    allowed = spread / 2 * (1 + 1e-6) + 1.01 * highest * TINY * (spread == 0)
    if largest < MAX / 1.01:
        assert (error <= allowed).all()
    else:
        assert (error <= allowed + largest / 64).all()


@given(st.integers(2, 8), st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.integers(1, 12))
def test_integers_and_scales_are_those_of_the_rule(bits, values, group_size):
    """Against float64, one group at a time; ties within float32's rounding of the quotient aside."""
    weight = torch.tensor([values], dtype=torch.float32)
    weight = weight.masked_fill(weight.abs() < 1e-30, 0.0)
    expected, expected_scales, _ = naive_quantized(weight.double().numpy(), bits, group_size)
    integers, scales = quantized(weight, bits, group_size)
    np.testing.assert_allclose(scales, expected_scales, rtol=2**-7)  # a scale between two bfloat16 may go either way
    same = torch.tensor(expected_scales == scales.double().numpy()).repeat_interleave(group_size, 1)[:, : len(values)]
    spread = scales.double().repeat_interleave(group_size, 1)[:, : len(values)]
    quotient = weight.double() / spread.masked_fill(spread == 0, 1.0)
    is_tie = ((quotient - quotient.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(integers[same & ~is_tie].double(), torch.tensor(expected)[same & ~is_tie])


def test_the_largest_of_a_group_gets_the_largest_integer():
    """Without which a second quantizing would find another scale: for every scale between two bfloat16 numbers."""
    for bits in range(2, 9):
        largest = torch.linspace(1, 4, 20001)[:, None]
        integers, _ = quantized(torch.cat([largest, -largest / 3], dim=1), bits, 2)
        assert (integers[:, 0] == 2 ** (bits - 1) - 1).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_scale_there_is_comes_back(bits):
    """All positive bfloat16 numbers but subnormal ones; also where a GPU divides by multiplying with the inverse."""
    highest = 2 ** (bits - 1) - 1
    scales = (torch.arange(0x0080, 0x7F80, dtype=torch.int32) << 16).view(torch.float32)
    scales = scales[scales.double() * highest <= MAX]
    assert len(scales) > 30000
    inverse = torch.tensor(1.0) / highest
    for found in (scales * highest / highest, scales * highest * inverse):
        assert torch.equal(found.bfloat16().float(), scales)
    for integer in range(highest + 1):
        assert torch.equal(scales * integer, (scales.double() * integer).float())
        assert ((scales * integer / scales).round() == integer).all()
    rows = torch.stack([scales * highest, -scales], dim=1)
    assert torch.equal(fake_quantized(rows, bits, 2), rows)


@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_beyond_float32_is_clipped(bits):
    """By a scale whose product with the largest integer is a float32, and nearly the largest."""
    weight = torch.tensor([[1e300, -1e200, 1.0], [-1e39, 1e38, 0.0]], dtype=torch.float64)
    integers, scales = quantized(weight, bits, 4)
    highest = 2 ** (bits - 1) - 1
    assert integers[0].tolist() == [highest, -highest, 0]
    assert integers[1, 0] == -highest
    assert ((highest * scales > MAX * (1 - 2**-6)) & (highest * scales <= MAX)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(value):
    """The trainer must see it; other groups keep their values."""
    weight = torch.tensor([[1.0, 2.0, value, 4.0, 5.0, -6.0]])
    acting = fake_quantized(weight, 4, 2)
    assert acting[0, 2:4].isnan().any()
    assert quantized(weight, 4, 2)[1].isfinite().tolist() == [[True, False, True]]
    assert torch.equal(acting[:, [0, 1, 4, 5]], fake_quantized(weight[:, [0, 1, 4, 5]], 4, 2))


@given(st.integers(1, 8), st.data())
def test_packing(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=33))
    packed = pack_bits(torch.tensor(values, dtype=torch.uint8), bits)
    stream = [value >> place & 1 for value in values for place in range(bits)]
    stream += [1] * (-len(stream) % 8)
    assert packed.tolist() == np.packbits(stream, bitorder="little").tolist()
    found = unpack_bits(packed, bits).tolist()
    assert found[: len(values)] == values
    assert all(value == 2**bits - 1 for value in found[len(values) :])


def saved(tmp_path, model=None, **settings):
    model = model or tiny_model()
    add_random_adapter(model, "qa", QuantizedLoraConfig(**settings))
    save_adapter(model, "qa", tmp_path / "qa")
    return model, tmp_path / "qa"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("group_size", "r"), [(64, 8), (7, 3)])
def test_loading_gives_exactly_the_values_that_acted(bits, group_size, r, tmp_path):
    model, folder = saved(tmp_path, bits=bits, group_size=group_size, r=r)
    other = tiny_model()
    load_adapter(other, folder)
    assert other.adapter_config("qa") == QuantizedLoraConfig(
        bits=bits, group_size=group_size, r=r, target_modules=PROJECTIONS
    )
    for left_layer, right_layer in zip(model.decoder_layers, other.decoder_layers, strict=True):
        for left, right in zip(
            left_layer.mlp.down_proj.loras_["qa"].low_rank(),
            (right_layer.mlp.down_proj.loras_["qa"].lora_A, right_layer.mlp.down_proj.loras_["qa"].lora_B),
            strict=True,
        ):
            assert torch.equal(left, right)
    (output,), found = run_step(model, RUN)
    (again,), gradients = run_step(other, RUN)
    assert torch.equal(again.logits, output.logits)
    assert all(torch.equal(gradients["qa"][key], gradient) for key, gradient in found["qa"].items())
    save_adapter(other, "qa", tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_loading_on_other_dtypes(dtype, tmp_path):
    model, folder = saved(tmp_path, tiny_model(dtype=dtype), bits=5, group_size=9)
    other = tiny_model(dtype=dtype)
    load_adapter(other, folder)
    assert torch.equal(run_step(other, RUN)[0][0].logits, run_step(model, RUN)[0][0].logits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_file_is_as_small_as_it_says(bits, tmp_path):
    """bits / 8 bytes an entry and 2 bytes a scale; the rest is names."""
    model, folder = saved(tmp_path, bits=bits, group_size=16)
    path = folder / "adapter_model.safetensors"
    integers = scales = 0
    for key, weight in model.adapter_state("qa").items():
        ranks, features = by_rank(key, weight).shape
        integers += math.ceil(bits * ranks * features / 8)
        scales += 2 * ranks * math.ceil(features / 16)
    (header,) = np.frombuffer(path.read_bytes()[:8], dtype="<u8")
    assert path.stat().st_size - 8 - int(header) == integers + scales
    entries = json.loads(path.read_bytes()[8 : 8 + int(header)])
    assert int(header) < 160 * len(entries)
    assert {entry["dtype"] for key, entry in entries.items() if key != "__metadata__"} == {"U8", "BF16"}


def test_it_starts_as_plain_lora_with_rounded_factors():
    model, other = tiny_model(), tiny_model()
    model.add_adapter("qa", QuantizedLoraConfig(bits=8), seed=2)
    other.add_adapter("qa", LoraConfig(), seed=2)
    plain = other.adapter_state("qa")
    assert all(torch.equal(weight, plain[key]) for key, weight in model.adapter_state("qa").items())
    (output,), found = run_step(model, RUN)
    (bare,), _ = run_step(other, random_run("", (5, 1, 7), seed=3))
    assert torch.equal(output.logits, bare.logits)
    assert all(gradient.any() == ("lora_B" in key) for key, gradient in found["qa"].items())


def test_merging_adds_the_quantized_product():
    model = tiny_model(dtype=torch.float64)
    add_random_adapter(model, "qa", QuantizedLoraConfig(bits=3, r=4, lora_alpha=6))
    linear = model.decoder_layers[0].self_attn.o_proj
    lora = linear.loras_["qa"]
    weight, _ = lora.merged(linear.base_layer_.weight, None)
    _, _, lora_a = naive_quantized(lora.lora_A.detach().numpy(), 3, 64)
    _, _, lora_b = naive_quantized(lora.lora_B.detach().T.numpy(), 3, 64)
    assert_close(weight, linear.base_layer_.weight + 1.5 * torch.tensor(lora_b.T @ lora_a), 1e-12)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".integers": torch.zeros(96)}, rf"{KEY}.integers is \[96\] of torch.float32 with scales"),
        ({".integers": torch.zeros(4, 24, dtype=torch.uint8)}, r"is \[4, 24\] of torch.uint8 with scales"),
        ({".integers": torch.zeros(95, dtype=torch.uint8)}, "holds 190 integers of bits=4 beside scales"),
        ({".integers": torch.zeros(384, dtype=torch.uint8)}, r"which are not 1 groups of group_size=64 in each of 8"),
        ({".integers": torch.full((96,), 255, dtype=torch.uint8)}, "holds 0 integers"),
        ({".scales": torch.ones(8)}, r"with scales \[8\] of torch.float32"),
        ({".scales": torch.ones(8, 2)}, "are not 2 groups"),
        ({".scales": None}, "lacks .*lora_A.weight"),
        ({".integers": None}, "lacks .*lora_A.weight"),
        ({".integers": torch.zeros(48, dtype=torch.uint8)}, "another base"),
    ],
)
def test_integers_that_cannot_be_the_factors_are_refused(changes, message, tmp_path):
    _, folder = saved(tmp_path)
    path = Path(folder) / "adapter_model.safetensors"
    weights = {**load_file(path), **{KEY + part: tensor for part, tensor in changes.items()}}
    save_file({key: tensor for key, tensor in weights.items() if tensor is not None}, path)
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert model.adapter_names == []


REFUSED = [
    ({"bits": 1}, "bits=1 must be in 2..8"),
    ({"bits": 9}, "bits=9 must be in 2..8"),
    ({"bits": 4.5}, "bits=4.5 must be int"),
    ({"group_size": 0}, "group_size=0 must be at least 1"),
    ({"r": 0}, "r=0 must be at least 1"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora' must be true, false or 'gaussian'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantizedLoraConfig(**fields)


def test_a_group_wider_than_the_row_is_the_row() -> None:
    """And takes no more memory: at this size a padded row would be a terabyte."""
    weight = torch.randn(3, 17, generator=torch.Generator().manual_seed(0))
    wide, exact = (quantized(weight, 4, size) for size in (10**12, 17))
    assert all(torch.equal(one, other) for one, other in zip(wide, exact, strict=True))
    assert torch.equal(fake_quantized(weight, 4, 10**12), fake_quantized(weight, 4, 17))
