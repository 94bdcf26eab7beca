"""What a few layers show is what all of them take."""

import dataclasses

import pytest
import torch
from tiny_run import adapter_entry, instructions, make_base_folder, run_config, write_jsonl

from moe_peft.training.adapter_run import AdapterRun
from moe_peft.training.forecast import probe as probe_module
from moe_peft.training.forecast.live_memory import follow
from moe_peft.training.forecast.probe import Probe
from moe_peft.training.forecast.work import forecast_run

SIZES = {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": 512}


def forecast_of(folder, num_layers, **run_changes):
    base = make_base_folder(folder / f"base-{num_layers}", num_hidden_layers=num_layers, **SIZES)
    data = write_jsonl(folder / "data.jsonl", instructions(24))
    entries = [
        adapter_entry("plain", data, batch_size=12),
        adapter_entry("mixed", data, batch_size=12, method="mixlora", num_experts=4, top_k=2),
    ]
    return forecast_run(run_config(base, folder / "out", *entries, **run_changes))


def probe_of(forecast):
    return Probe(forecast.shape, forecast.adapters, forecast.config.activation_checkpointing)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_memory_of_three_layers_extends_to_all(mode, tmp_path, monkeypatch):
    """Against the peak of a model that has all the layers, to a hundredth."""
    forecast = forecast_of(tmp_path, 9, activation_checkpointing=mode)
    micro_batches = forecast.micro_batches(forecast.steps[0])
    assert len(micro_batches) == 2
    shallow = probe_of(forecast)
    assert shallow._depth == 3
    estimate = shallow.memory_of_step(micro_batches)
    monkeypatch.setattr(probe_module, "_LAYERS", 9)
    whole = probe_of(forecast)
    assert whole._depth == 9
    truth = whole.memory_of_step(micro_batches)
    assert estimate == pytest.approx(truth, rel=0.01)
    assert truth > 1.15 * probe_of(forecast_of(tmp_path / "x", 3, activation_checkpointing=mode)).memory_of_step(
        micro_batches
    )


def test_memory_of_a_model_with_fewer_layers_than_the_probe(tmp_path):
    forecast = forecast_of(tmp_path, 1)
    assert probe_of(forecast).memory_of_step(forecast.micro_batches(forecast.steps[0])) > 0


def test_time_of_a_few_layers_extends_to_all(tmp_path, monkeypatch):
    """What only the first time takes is not multiplied."""
    probe = probe_of(forecast_of(tmp_path, 9))
    depths = []

    def seconds(probe, action):
        action()
        return 5.0 + 0.25 * depths[-1] + 2.0 * (len(depths) == 1)

    monkeypatch.setattr(Probe, "_seconds", seconds)
    monkeypatch.setattr(Probe, "_step", lambda self, parts: depths.append(len(self._model.layers)))
    assert probe.seconds_of_step([]) == pytest.approx(5.0 + 0.25 * 9 + 2.0)
    assert depths == [3, 3, 1]
    assert len(probe._model.layers) == 3


def test_a_step_is_a_whole_training_step(tmp_path):
    forecast = forecast_of(tmp_path, 9)
    probe = probe_of(forecast)
    micro_batches = forecast.micro_batches(forecast.steps[0])
    before = {name: value.clone() for name, value in probe._model.adapter_state("mixed").items()}
    assert probe.seconds_of_step(micro_batches) > 0
    after = probe._model.adapter_state("mixed")
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert all(weight.grad is None for weight in probe._model.parameters())


def test_the_weights_are_as_many_and_of_the_dtype(tmp_path):
    forecast = forecast_of(tmp_path, 9, dtype="bfloat16")
    model = probe_of(forecast)._model
    full = dict(dataclasses.replace(forecast.shape).empty_model().named_parameters())
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            assert (weight.shape, weight.dtype) == (full[name].shape, torch.bfloat16)
            assert weight.isfinite().all()
    assert model.lm_head_.weight is model.embed_tokens.weight


def test_live_memory_is_counted():
    with follow(torch.device("cpu")) as live:
        kept = torch.empty(1000, dtype=torch.uint8)
        live.mark("one")
        gone = torch.empty(5000, dtype=torch.uint8)
        del gone
        live.mark("two")
        more = torch.empty(300, dtype=torch.uint8)
    assert (live.at("one"), live.at("two")) == (1000, 1000)
    assert (live.peak(), live.peak("one", "two"), live.peak(last="one"), live.peak("two")) == (6000, 6000, 1000, 1300)
    assert not live.has("three")
    del kept, more


def test_following_says_nothing(capfd):
    with follow(torch.device("cpu")) as live:
        torch.empty(10)
    assert live.peak() == 40
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"layers_to_transform": [4, 8], "r": 9}, 2 / 9),
        ({"rank_pattern": {r"layers\.8\..*": 18}, "r": 9}, 10 / 9),
        ({"init_lora_weights": "pissa", "r": 9}, 1.0),
    ],
    ids=str,
)
def test_adapters_that_are_not_alike_on_every_layer_are_planned(settings, share, tmp_path):
    """Nine layers, of which the probe has three: it tries the mean rank, and decomposes nothing large."""
    base = make_base_folder(tmp_path / "base", num_hidden_layers=9, **SIZES)
    data = write_jsonl(tmp_path / "data.jsonl", instructions(24))
    forecast = forecast_run(run_config(base, tmp_path / "out", adapter_entry("own", data, **settings)))
    probe = probe_of(forecast)
    for layer in probe._model.layers:
        assert layer.mlp.up_proj.loras_["own"].lora_A.shape[0] == round(9 * share)
    own = forecast.adapters["own"]
    assert own.num_trainable == pytest.approx(share * 9 * 9 * features_of(probe), rel=1e-6)
    assert own.state_bytes == (4 + ("init_lora_weights" in settings)) * own.weight_bytes
    assert probe.memory_of_step(forecast.micro_batches(forecast.steps[0])) > 0


def features_of(probe):
    """Inputs and outputs of a layer's projections: a rank more on all of them has as many parameters."""
    layer = probe._model.layers[0]
    linears = [one for part in (layer.self_attn, layer.mlp) for one in part.children() if hasattr(one, "loras_")]
    return sum(linear.in_features + linear.out_features for linear in linears)


@pytest.mark.parametrize(("steps", "rank"), [(2, 6), (3, 12), (9, 24)])
def test_ranks_that_grow_are_planned_at_their_largest(steps, rank, tmp_path):
    """A growth every two steps, none behind the last: of four, two come to ``max_rank``."""
    base = make_base_folder(tmp_path / "base", num_hidden_layers=9, **SIZES)
    data = write_jsonl(tmp_path / "data.jsonl", instructions(24))
    settings = {"method": "adaptive_lora", "r": 6, "grow_every": 2, "grow_share": 1.0, "max_steps": steps}
    entry = adapter_entry("own", data, batch_size=12, **settings)
    forecast = forecast_run(run_config(base, tmp_path / "out", entry))
    probe, own = probe_of(forecast), forecast.adapters["own"]
    assert own.data.plan.num_steps == steps
    assert own.num_trainable == 6 * 9 * features_of(probe)  # what is printed is what it begins with
    assert own.weight_bytes == 4 * rank * 9 * features_of(probe)
    assert own.state_bytes == 4 * own.weight_bytes + own.buffer_bytes
    for layer in probe._model.layers:
        assert layer.mlp.up_proj.loras_["own"].lora_A.shape[0] == rank
    run = AdapterRun(own.job, own_model(forecast), own.data.plan, own.data.train_set, None)
    for step in range(1, steps + 1):  # the truth: what the run itself grows to
        run.updates.after_step(step)
    assert sum(weight.numel() for weight in run.parameters) == own.num_largest


def own_model(forecast):
    """The whole base, random, with the run's adapters as they begin."""
    model = probe_module._random_model(forecast.shape)
    for name, adapter in forecast.adapters.items():
        model.add_adapter(name, adapter.job.adapter)
    return model
