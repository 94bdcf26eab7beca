"""config.json read as transformers reads it, or refused by the field that would be lost."""

import json

import pytest
import transformers

from moe_peft.io.hf_config import llama_config_from_dict, read_llama_config
from moe_peft.model.config import LlamaConfig, RopeScaling

CONFIG_CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SAME_NAMES = (*SIZES, "rms_norm_eps", "tie_word_embeddings")


def assert_agrees(ours: LlamaConfig, theirs: transformers.PreTrainedConfig) -> None:
    """Everything in our config is what transformers made of the same fields."""
    for name in SAME_NAMES:
        assert getattr(ours, name) == getattr(theirs, name), name
    default_head = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or default_head)
    assert ours.qkv_bias == (theirs.model_type == "qwen2")
    assert ours.qk_norm == (theirs.model_type == "qwen3")
    reads_bias = theirs.model_type in ("llama", "qwen3")
    assert ours.attention_bias == (reads_bias and theirs.attention_bias)
    assert ours.mlp_bias == (theirs.model_type == "llama" and theirs.mlp_bias)
    slides = theirs.model_type == "mistral" or "sliding_attention" in (getattr(theirs, "layer_types", None) or [])
    assert ours.sliding_window == (theirs.sliding_window if slides else None)
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    if rope["rope_type"] == "default":
        assert ours.rope_scaling is None
    else:
        assert ours.rope_scaling is not None
        assert ours.rope_scaling.rope_type == rope["rope_type"]
        for name in set(rope) & set(RopeScaling.__dataclass_fields__) - {"rope_type"}:
            assert getattr(ours.rope_scaling, name) == rope[name], name


@pytest.mark.parametrize("model_type", CONFIG_CLASSES)
def test_absent_fields_have_transformers_defaults(model_type):
    assert_agrees(llama_config_from_dict({"model_type": model_type}), CONFIG_CLASSES[model_type]())


@pytest.mark.parametrize("model_type", CONFIG_CLASSES)
def test_saved_configs_round_trip(model_type, tmp_path):
    theirs = CONFIG_CLASSES[model_type](**SIZES, rms_norm_eps=1e-5, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    assert_agrees(read_llama_config(tmp_path), theirs)


ROPE_CASES = {
    "old default": {"rope_theta": 500000.0, "rope_scaling": None},
    "old linear": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "old dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 3}},
    "old llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama3, trained context outside": {
        "original_max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "old yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "yarn without trained context": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, every field": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.5,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.5,
            "truncate": False,
        }
    },
    "new default": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "new without theta": {"rope_theta": 9.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "inner theta wins": {"rope_theta": 9.0, "rope_parameters": {"rope_type": "default", "rope_theta": 8.0}},
    "old spelling wins": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5.0},
    },
    "rope_type wins over type": {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
}


@pytest.mark.filterwarnings("ignore")  # transformers warns of unusual combinations
@pytest.mark.parametrize("case", ROPE_CASES)
def test_rope_in_both_spellings(case):
    fields = {**SIZES, **ROPE_CASES[case]}
    copy = json.loads(json.dumps(fields))  # transformers edits what it is given
    ours = llama_config_from_dict({"model_type": "llama", **fields})
    theirs = transformers.LlamaConfig(**copy)
    theirs.standardize_rope_params()  # as its modelling code does before it looks
    assert_agrees(ours, theirs)


def test_yarn_factor_null_is_the_ratio_of_contexts():
    config = llama_config_from_dict(
        {
            "model_type": "llama",
            **SIZES,
            "rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 32},
        }
    )
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 4.0


FIELD_CASES = [
    ("llama", {"num_key_value_heads": None}),
    ("llama", {"head_dim": 20}),
    ("llama", {"head_dim": None}),
    ("qwen2", {"head_dim": 20}),
    ("qwen3", {"head_dim": 20}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("mistral", {"attention_bias": True}),  # Mistral's code does not look at it
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"sliding_window": None}),
    ("llama", {"sliding_window": 7}),  # nor LLaMA's at this
    ("qwen2", {"sliding_window": 7}),
    ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}),
    ("qwen3", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}),
    ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}),
    ("qwen3", {"layer_types": ["full_attention"] * 3}),
]


@pytest.mark.parametrize(("model_type", "fields"), FIELD_CASES)
def test_fields_mean_what_they_mean_to_transformers(model_type, fields):
    ours = llama_config_from_dict({"model_type": model_type, **SIZES, **fields})
    assert_agrees(ours, CONFIG_CLASSES[model_type](**{**SIZES, **fields}))


def test_fields_that_change_nothing_are_ignored():
    plain = llama_config_from_dict({"model_type": "llama", **SIZES})
    noisy = llama_config_from_dict(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            **SIZES,
            "bos_token_id": 1,
            "eos_token_id": [2, 3],
            "use_cache": True,
            "torch_dtype": "bfloat16",
            "initializer_range": 0.1,
            "transformers_version": "4.31.0",
            "_name_or_path": "somewhere",
            "pretraining_tp": 1,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "quantization_config": None,
            "partial_rotary_factor": 1.0,
            "is_llama_config": True,
        }
    )
    assert noisy == plain


REFUSALS = [
    ({"model_type": "gemma2"}, r"model_type='gemma2' is not supported: it must be one of llama, mistral, qwen2, qwen3"),
    ({"model_type": "qwen"}, r"did you mean 'qwen3?2?'"),
    ({"model_type": None}, "model_type=None"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=.*'LlamaForCausalLM'"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
    ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "auto_map="),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"pretraining_tp": 2}, "pretraining_tp=2"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
    ({"logits_scaling": 8.0}, "logits_scaling=8.0"),
    ({"num_local_experts": 8}, "num_local_experts=8"),
    ({"is_causal": False}, "is_causal=False"),
    ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config="),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type='longrope' in rope_scaling is not supported"),
    ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type='su'"),
    ({"rope_scaling": {"type": "liner", "factor": 2.0}}, "did you mean 'linear'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' needs factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "needs high_freq_factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5"),
    ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor='two'"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "'full_attention' is not supported"),
    ({"rope_theta": 0}, "rope_theta=0"),
    ({"rope_theta": "big"}, "rope_theta='big'"),
    ({"hidden_size": 32.5}, "hidden_size=32.5"),
    ({"hidden_size": "32"}, "hidden_size='32'"),
    ({"hidden_size": True}, "hidden_size=True"),
    ({"num_hidden_layers": 10**9, "layer_types": []}, "layer_types="),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types="),
    ({"layer_types": ["full_attention"] * 2}, "layer_types="),
    ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "layer_types="),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "layer_types="),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
        "from layer 1 on .* not supported: all layers must be full_attention, or all sliding_attention",
    ),
    (
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "layer_types": ["sliding_attention"] + 2 * ["full_attention"],
        },
        r"layer_types=.* is not supported: all layers must be",
    ),
    (
        {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention", "linear_attention", "x"]},
        "layer_types=.*linear_attention",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSALS)
def test_what_would_be_lost_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        llama_config_from_dict({"model_type": "llama", **SIZES, **fields})


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_llama_config(tmp_path)
    path = tmp_path / "config.json"
    for content, message in [
        ('{"model_type": "llama",', r"config\.json is not valid JSON: .* at line 1, column"),
        ("[1]", "must hold a JSON object, not a list"),
        ('{"model_type": "opt"}', r"config\.json: model_type='opt'"),
        ("[" * 100_000, "nested too deeply|is not valid JSON"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_llama_config(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_llama_config(tmp_path)
