"""What may be asked: prompts in their three forms, and the limits of requests."""

import pytest
import torch
from builders import add_random_adapter, tiny_config, tiny_model
from tiny_run import make_base_folder

from moe_peft import LoraConfig, MixLoraConfig
from moe_peft.data.tokenizer import Tokenizer, load_tokenizer
from moe_peft.generation.request import Request, check_request, encode_prompt
from moe_peft.model.config import RopeScaling


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_base_folder(tmp_path_factory.mktemp("base")))


def test_prompts_are_texts_conversations_or_ids(tokenizer: Tokenizer) -> None:
    assert encode_prompt(tokenizer, "Write") == tokenizer.encode("Write")
    messages = [{"role": "user", "content": "Write"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert encode_prompt(tokenizer, messages) == chat
    assert encode_prompt(tokenizer, tuple(messages)) == chat
    assert encode_prompt(tokenizer, [5, 6]) == [5, 6]
    assert encode_prompt(tokenizer, torch.tensor([5, 6]).numpy()) == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        ("", "'' must come to at least one token"),
        ([], "must come to at least one token"),
        ({"role": "user", "content": "x"}, "must be a text, a list of messages, or a list of token ids"),
        (["x"], "must be a text"),
        ([1, True], "must be a text"),
        ([1.5], "must be a text"),
    ],
)
def test_other_prompts_are_refused(tokenizer: Tokenizer, prompt: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        encode_prompt(tokenizer, prompt)  # type: ignore[arg-type]


class AroundTokenizer:
    """A tokenizer that puts tokens before and behind a text, as one with add_bos_token and add_eos_token does."""

    prefix_ids = (1,)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [ord(letter) for letter in text]
        return [1, *ids, 2] if add_special_tokens else ids


def test_a_text_is_not_ended_before_its_answer() -> None:
    assert encode_prompt(AroundTokenizer(), "ab") == [1, 97, 98]  # type: ignore[arg-type]
    assert encode_prompt(AroundTokenizer(), "") == [1]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        (None, 64),
        (RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8), 64),
        (RopeScaling(rope_type="linear", factor=4.0), 256),
        (RopeScaling(rope_type="yarn", factor=4.0), 256),
        (RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), 64),
        (RopeScaling(rope_type="yarn", factor=8.0, original_max_position_embeddings=16), 128),
        (RopeScaling(rope_type="dynamic", factor=2.0), None),
    ],
)
def test_the_context_limit_of_every_scaling(scaling: RopeScaling | None, limit: int | None) -> None:
    config = tiny_config(rope_scaling=scaling)
    assert config.context_limit == limit
    model = tiny_model(config)
    length = 10_000 if limit is None else limit
    check_request(model, Request(prompt_ids=(3,) * (length - 10), max_new_tokens=10))
    if limit is not None:
        with pytest.raises(
            ValueError, match=f"max_new_tokens=10 and a prompt of {limit - 9} must come to at most {limit}"
        ):
            check_request(model, Request(prompt_ids=(3,) * (limit - 9), max_new_tokens=10))


def test_requests_that_a_model_cannot_answer() -> None:
    model = tiny_model()
    add_random_adapter(model, "style", LoraConfig(r=2))
    add_random_adapter(model, "qa", MixLoraConfig(r=2, num_experts=3, top_k=2))
    for name in ("", "style", "qa", "moe.qa.experts.0", "moe.qa.experts.2"):
        check_request(model, Request(prompt_ids=(1,), adapter_name=name, max_new_tokens=9))
    for name, rule in {
        "stile": "adapter 'stile' is not attached to this model; did you mean 'style'?",
        "moe.qb.experts.0": "adapter 'qb' is not attached to this model; valid here: qa, style",
        "moe.qa.experts.3": "adapter 'qa' has no expert 'moe.qa.experts.3': it has num_experts=3",
        "moe.style.experts.0": "adapter 'style' has no expert 'moe.style.experts.0'",
    }.items():
        with pytest.raises(ValueError) as refusal:
            check_request(model, Request(prompt_ids=(1,), adapter_name=name, max_new_tokens=9))
        assert rule in str(refusal.value)
    for token_id in (-1, model.config_.vocab_size):
        with pytest.raises(ValueError, match=f"token id {token_id} of the prompt must be in 0..vocab_size-1=60"):
            check_request(model, Request(prompt_ids=(1, token_id), max_new_tokens=9))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"prompt_ids": ()}, r"prompt_ids=\(\) must hold at least one token"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 1.5}, r"max_new_tokens=1\.5 must be int"),
        ({"stop": ("a", "")}, "must hold no empty string"),
        ({"stop": (1,)}, r"stop\[0\]=1 must be str"),
        ({"adapter_name": None}, "adapter_name=None must be str"),
    ],
)
def test_requests_outside_their_rules(changes: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Request(**{"prompt_ids": (1,), **changes})
