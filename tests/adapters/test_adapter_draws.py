"""Random draws depend on the adapter, its seed and its progress alone: never on global state or company."""

import pytest
import torch
from builders import add_random_adapter, fuse, random_run, run_step, tiny_model

from moe_peft import LoraConfig, MixLoraConfig
from moe_peft.model.draws import dropout_mask, generator_for
from moe_peft.model.forward import ForwardBatch

LORA = LoraConfig(r=3, lora_dropout=0.3)
MIX = MixLoraConfig(r=2, num_experts=3, lora_dropout=0.3, router_jitter_noise=0.2)


def initial(name, config, *, seed=0, before=()):
    model = tiny_model()
    for other in before:
        model.add_adapter(other, MIX)
    model.add_adapter(name, config, seed=seed)
    return model.adapter_state(name)


def same(left, right):
    return all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("config", [LORA, MIX])
def test_initial_weights(config):
    first = initial("qa", config)
    torch.manual_seed(99)
    assert same(initial("qa", config, before=("a", "b")), first)
    drawn = {key: weight for key, weight in first.items() if "lora_B" not in key}
    for other in (initial("qa", config, seed=1), initial("qb", config)):
        for key, weight in drawn.items():
            assert not torch.equal(other[key], weight), key
    weights = list(drawn.values())
    for i, weight in enumerate(weights):
        for later in weights[i + 1 :]:
            assert weight.shape != later.shape or not torch.equal(weight, later)  # no two sites share a draw


def test_router_range():
    model = tiny_model()
    model.add_adapter("qa", MixLoraConfig(r=2, num_experts=64, router_init_range=0.5))
    for key, weight in model.adapter_state("qa").items():
        if "moe_gate" in key:
            assert weight.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("config", [LORA, MIX])
def test_global_state_is_neither_read_nor_moved(config):
    model = tiny_model().train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    add_random_adapter(model, "qa", config)
    outputs, found = run_step(model, random_run("qa", (5, 2)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again, found_again = run_step(model, random_run("qa", (5, 2)))
    assert torch.equal(again[0].logits, outputs[0].logits)
    assert same(found_again["qa"], found["qa"])


@pytest.mark.parametrize("config", [LORA, MIX, MixLoraConfig(r=2, num_experts=3, router_jitter_noise=0.2)])
def test_draws_follow_the_adapters_progress(config):
    model = tiny_model()
    add_random_adapter(model, "qa", config, seed=1)
    add_random_adapter(model, "qb", config, seed=1)
    add_random_adapter(model, "qc", config, seed=2)
    for name in ("qb", "qc"):
        for key, weight in model.adapter_state(name).items():
            weight.copy_(model.adapter_state("qa")[key.replace(name, "qa")])

    def logits(name="qa", **progress):
        with torch.no_grad():
            return model(fuse(random_run(name, (5, 2), **progress)))[0].loss

    model.eval()
    calm = logits()
    assert torch.equal(logits(step=1), calm)
    assert torch.equal(logits("qb"), calm)
    assert torch.equal(logits("qc"), calm)
    model.train()
    places = [("qa", {}), ("qa", {"step": 1}), ("qa", {"micro_batch": 1}), ("qb", {}), ("qc", {})]
    losses = [logits(name, **progress).item() for name, progress in places]
    assert len({calm.item(), *losses}) == len(losses) + 1
    assert [logits(name, **progress).item() for name, progress in places] == losses


@pytest.mark.parametrize("config", [LORA, MIX])
def test_one_mask_is_shared_by_everything_that_reads_an_input(config, monkeypatch):
    """q, k and v see one mask, so do gate and up, so do all experts; o and down have their own."""
    model = tiny_model().train()
    add_random_adapter(model, "qa", config)
    masks = {}
    make_mask = ForwardBatch.dropout_mask

    def spy(batch, segment, seed, p, layer_idx, input_name, x):
        mask = make_mask(batch, segment, seed, p, layer_idx, input_name, x)
        masks.setdefault((layer_idx, input_name), []).append(mask)
        return mask

    monkeypatch.setattr(ForwardBatch, "dropout_mask", spy)
    model(fuse(random_run("qa", (5, 2))))
    assert set(masks) == {(i, name) for i in (0, 1) for name in ("attn_in", "attn_out", "mlp_in", "mlp_hidden")}
    for site in masks.values():
        assert all(torch.equal(mask, site[0]) for mask in site)
    firsts = [site[0] for site in masks.values()]
    for i, mask in enumerate(firsts):
        for later in firsts[i + 1 :]:
            assert mask.shape != later.shape or not torch.equal(mask, later)


def test_masks_keep_the_expectation():
    for p in (0.1, 0.5, 0.9):
        mask = dropout_mask((200, 300), p, like=torch.empty(0, dtype=torch.float64), key=(1, "a"))
        assert set(mask.unique().tolist()) == {0.0, 1 / (1 - p)}
        assert mask.mean().item() == pytest.approx(1.0, abs=0.05)
    assert dropout_mask((2, 3), 0.5, like=torch.empty(0, dtype=torch.bfloat16), key=(1,)).dtype == torch.bfloat16


def test_keys_do_not_run_together():
    """(1, 23) is not (12, 3), nor is ("a", "b") ("ab",), and a number is not its spelling."""
    keys = [(1, 23), (12, 3), (1, 2, 3), ("a", "b"), ("ab",), ("a, b",), ("a'", "b"), (1,), ("1",), (1, ""), ()]
    streams = [tuple(torch.rand(4, generator=generator_for(*key)).tolist()) for key in keys]
    assert len(set(streams)) == len(keys)
    assert tuple(torch.rand(4, generator=generator_for(1, 23)).tolist()) == streams[0]
