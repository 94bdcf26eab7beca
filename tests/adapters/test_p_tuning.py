"""P-tuning's dropout, what an adapter of loaded embeddings is, and what its config refuses."""

import re

import pytest
import torch
from builders import Run, add_random_adapter, fuse, random_run, run_step, tiny_model

from moe_peft import PromptEncoderConfig, load_adapter, save_adapter
from moe_peft.io.adapter_files import read_adapter_config

ENCODERS = {
    "mlp": {"encoder_hidden_size": 9},
    "lstm": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5, "encoder_num_layers": 3},
}
RUN = random_run("qa", (5, 3), seed=2)


def losses(model, *runs):
    with torch.no_grad():
        return [output.loss.item() for output in model(fuse(*runs))]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_dropout_is_between_layers_and_in_training_alone(encoder):
    """Another mask at every step and micro-batch, the same at the same, and none in evaluation."""
    model = tiny_model()
    plain = PromptEncoderConfig(num_virtual_tokens=4, **ENCODERS[encoder])
    for name, dropout in (("qa", 0.5), ("plain", 0.0)):
        config = PromptEncoderConfig(num_virtual_tokens=4, encoder_dropout=dropout, **ENCODERS[encoder])
        add_random_adapter(model, name, config if dropout else plain, seed=1)
    (expected,) = losses(model, Run("plain", RUN.samples, RUN.labels))
    assert losses(model, RUN) == [expected]
    model.train()
    assert losses(model, Run("plain", RUN.samples, RUN.labels)) == [expected]
    places = [(step, part) for step in (0, 1) for part in (0, 1)]
    found = [losses(model, Run("qa", RUN.samples, RUN.labels, *place))[0] for place in places]
    assert len({expected, *found}) == 5
    assert found == [losses(model, Run("qa", RUN.samples, RUN.labels, *place))[0] for place in places]
    model.activation_checkpointing_ = "full"
    assert losses(model, Run("qa", RUN.samples, RUN.labels, 1, 1)) == found[3:]


def test_dropout_zeroes_that_share_of_the_features_and_scales_the_rest():
    """Two dropped layers of ones: the mean stays, and features are what two masks make of them."""
    model = tiny_model()
    model.add_adapter("qa", PromptEncoderConfig(num_virtual_tokens=50, encoder_hidden_size=80, encoder_dropout=0.25))
    encoder = model.prompts_["qa"]
    with torch.no_grad():
        for key, weight in encoder.named_parameters():
            weight.fill_(0.0 if key != "mlp_head.0.bias" else 1.0)
        encoder.mlp_head[2].weight.copy_(torch.eye(80))
        encoder.mlp_head[4].weight.copy_(torch.eye(80)[:24])
    from moe_peft.model.batch import Segment
    from moe_peft.model.forward import ForwardBatch

    segment, table = Segment("qa", "qa", 0, 50, 3, 0), torch.zeros(50, 1, 2)
    features = encoder(segment, ForwardBatch((segment,), (0, 50), table, table, training=True))
    kept = features[features != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / 0.75**2))
    assert 0.5 < kept.numel() / features.numel() < 0.62  # 0.75 ** 2
    assert torch.equal(encoder(), torch.ones(50, 24))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_loaded_adapter_is_its_embeddings(encoder, tmp_path):
    model = tiny_model()
    add_random_adapter(model, "qa", PromptEncoderConfig(num_virtual_tokens=3, **ENCODERS[encoder]))
    save_adapter(model, "qa", tmp_path / "qa")
    config = read_adapter_config(tmp_path / "qa")
    assert config == PromptEncoderConfig(num_virtual_tokens=3, inference_mode=True)
    load_adapter(model, tmp_path / "qa", "again")
    assert torch.equal(model.adapter_state("again")["prompt_embeddings"], model.prompts_["qa"]())
    _, found = run_step(model.train(), Run("again", RUN.samples, RUN.labels))
    assert found["again"]["prompt_embeddings"].abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 must be at least 1"),
        ({"encoder_reparameterization_type": "GRU"}, "encoder_reparameterization_type='GRU' must be MLP | LSTM"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size=0 must be at least 1, or null"),
        ({"encoder_num_layers": 0}, "encoder_num_layers=0 must be at least 1"),
        ({"encoder_num_layers": 3}, "encoder_num_layers=3 is for encoder_reparameterization_type='LSTM'"),
        ({"encoder_dropout": 1.0}, r"encoder_dropout=1.0 must be in \[0, 1\)"),
        (
            {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1, "encoder_dropout": 0.1},
            "encoder_dropout=0.1 is between layers, so it must be 0 for encoder_num_layers=1",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.compile(message)):
        PromptEncoderConfig(**settings)
