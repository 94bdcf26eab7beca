"""Generation against transformers, against the model without a cache, and against each request alone."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import transformers
from builders import add_random_adapter, random_samples, tiny_config, tiny_model
from hf_twin import our_name

from moe_peft import BatchConfig, LlamaForCausalLM, LoraConfig, MixLoraConfig, ModelInput
from moe_peft.generation import generate, generate_tokens
from moe_peft.generation.request import Completion, Request, encode_prompt
from moe_peft.generation.sampling import Sampling
from moe_peft.io.source import resolve_source
from moe_peft.model.cache import KVCache
from moe_peft.model.config import RopeScaling

NAMES = ("", "style", "qa", "other", "moe.qa.experts.1")


class Letters:
    """A tokenizer with one letter a token."""

    prefix_ids = (1,)

    def __init__(self, *eos_token_ids: int) -> None:
        self.eos_token_ids = eos_token_ids
        self.special_ids = {"<end>": 7}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 64 for letter in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(64 + token_id) for token_id in ids if token_id != 7)


def model_with_adapters(dtype: torch.dtype = torch.float64, **changes: object) -> LlamaForCausalLM:
    model = tiny_model(tiny_config(**changes), dtype=dtype)
    add_random_adapter(model, "style", LoraConfig(r=2, lora_dropout=0.5), seed=1)
    add_random_adapter(
        model, "qa", MixLoraConfig(r=3, num_experts=4, top_k=2, lora_dropout=0.5, router_jitter_noise=0.3), seed=2
    )
    add_random_adapter(model, "other", MixLoraConfig(r=2, num_experts=2, top_k=1), seed=3)
    return model


def mixed_requests(**changes: object) -> list[Request]:
    """Two prompts of different lengths for everyone, adapters interleaved."""
    prompts = random_samples([5, 1, 9, 3, 7, 2, 11, 4, 6, 8])
    requests = [
        Request(
            prompt_ids=tuple(prompt),
            adapter_name=name,
            max_new_tokens=4 + i % 3,
            sampling=Sampling(temperature=0.8 if i % 2 else 0.0, top_k=20, seed=i),
        )
        for i, (prompt, name) in enumerate(zip(prompts, itertools.cycle(NAMES), strict=False))
    ]
    return [dataclasses.replace(request, **changes) for request in requests]  # type: ignore[arg-type]


def without_cache(model: LlamaForCausalLM, request: Request) -> tuple[int, ...]:
    """Greedy by the definition: the whole sequence anew for every token."""
    ids = list(request.prompt_ids)
    for _ in range(request.max_new_tokens):
        ends = torch.tensor([0, len(ids)], dtype=torch.int32)
        with torch.no_grad():
            output = model(ModelInput(torch.tensor(ids), ends, (BatchConfig(request.adapter_name, 0, 1),)))[0]
        ids.append(int(output.logits[-1].argmax()))
    return tuple(ids[len(request.prompt_ids) :])


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}], ids=["full", "window"])
def test_greedy_equals_the_model_without_a_cache(changes: dict) -> None:
    model = model_with_adapters(**changes)
    requests = mixed_requests(sampling=Sampling())
    completions = generate_tokens(model, Letters(), requests)
    for request, completion in zip(requests, completions, strict=True):
        assert completion.token_ids == without_cache(model, request), request.adapter_name
        assert completion.finish_reason == "length"


def test_a_mixed_batch_gives_everyone_what_it_gets_alone() -> None:
    model = model_with_adapters()
    requests = mixed_requests(stop=("B", "XY"))
    together = generate_tokens(model, Letters(3, 30), requests)
    alone = [generate_tokens(model, Letters(3, 30), [request])[0] for request in requests]
    assert together == alone
    assert len({completion.token_ids for completion in together}) == len(requests)
    assert generate_tokens(model, Letters(3, 30), requests[::-1]) == alone[::-1]
    for batch_size in (1, 3, 100):
        assert generate_tokens(model, Letters(3, 30), requests, batch_size=batch_size) == alone


def test_an_adapters_prompts_share_one_range_of_the_batch() -> None:
    model, forwards = model_with_adapters(), []
    model.register_forward_pre_hook(lambda _, arguments: forwards.append(arguments[0]))
    generate_tokens(model, Letters(), mixed_requests())
    assert len(forwards) == 6
    for batch in forwards:
        names = [config.adapter_name for config in batch.batch_configs_]
        assert len(names) == len(set(names))
    # The prompts at once, then a token a row, and only of the rows that are not done.
    assert [len(batch.input_ids) for batch in forwards] == [56, 10, 10, 10, 6, 3]


def test_generate_says_the_same_in_short() -> None:
    model, tokenizer = model_with_adapters(), Letters()
    prompts = ["HELLO", [5, 6, 7], "X"]
    texts = generate(model, tokenizer, prompts, adapter_names=["qa", "", "style"], max_new_tokens=5, stop="Q")
    for prompt, name, text in zip(([8, 5, 12, 12, 15], [5, 6, 7], [24]), ("qa", "", "style"), texts, strict=True):
        ids = (1, *prompt) if prompt != [5, 6, 7] else (5, 6, 7)
        answer = without_cache(model, Request(prompt_ids=ids, adapter_name=name, max_new_tokens=5))
        assert text == tokenizer.decode(answer).split("Q")[0]
    same = generate(model, tokenizer, prompts, adapter_names="qa", max_new_tokens=5)
    assert same == generate(model, tokenizer, prompts, adapter_names=["qa"] * 3, max_new_tokens=5)
    base = generate(model, tokenizer, prompts, max_new_tokens=5)
    assert base == generate(model, tokenizer, prompts, adapter_names=["", "", ""], max_new_tokens=5)
    assert generate(model, tokenizer, []) == []
    assert generate_tokens(model, tokenizer, []) == []


def test_sampling_is_repeatable_and_each_prompt_has_its_own_seed() -> None:
    model, tokenizer = model_with_adapters(), Letters()
    settings = {"temperature": 2.0, "max_new_tokens": 12}
    first = generate(model, tokenizer, ["A"] * 4, seed=[1, 2, 3, 1], **settings)
    torch.manual_seed(5)
    assert first == generate(model, tokenizer, ["A"] * 4, seed=[1, 2, 3, 1], **settings)
    assert first[0] == first[3]
    assert len(set(first)) == 3
    assert generate(model, tokenizer, ["B", "A"], seed=2, **settings)[1] == first[1]


def test_requests_draw_for_themselves() -> None:
    """The same request draws the same; another prompt of its length, or another adapter, draws anew."""
    model = model_with_adapters()
    for weight in model.parameters():
        weight.data.zero_()  # every token equally probable, whatever stands before
    sampling = Sampling(temperature=1.0, seed=4)
    prompts = ((1, 2, 3), (1, 2, 3), (3, 2, 1))
    requests = [Request(prompt_ids=ids, max_new_tokens=8, sampling=sampling) for ids in prompts]
    requests.append(dataclasses.replace(requests[0], adapter_name=model.adapter_names[0]))
    same, again, other_prompt, other_adapter = (done.token_ids for done in generate_tokens(model, Letters(), requests))
    assert same == again
    assert len({same, other_prompt, other_adapter}) == 3


def test_why_an_answer_ends() -> None:
    model = model_with_adapters()
    request = Request(prompt_ids=(9, 8), adapter_name="qa", max_new_tokens=6)
    tokens = generate_tokens(model, Letters(), [request])[0].token_ids
    letters = Letters().decode(tokens)
    assert len(set(tokens)) >= 4
    assert 7 not in tokens

    def answer(tokenizer: Letters, **changes: object) -> Completion:
        return generate_tokens(model, tokenizer, [dataclasses.replace(request, **changes)])[0]  # type: ignore[arg-type]

    place = max(i for i in range(6) if tokens[i] not in tokens[:i])
    ended = answer(Letters(60, tokens[place]))
    assert ended == Completion(text=letters[:place], token_ids=tokens[: place + 1], finish_reason="eos")
    stopped = answer(Letters(), stop=("never", letters[place - 1 : place + 1]))
    cut = letters.index(letters[place - 1 : place + 1])
    assert stopped == Completion(text=letters[:cut], token_ids=tokens[: cut + 2], finish_reason="stop")
    # The last token may be the first of a stop string: then it is text.
    almost = answer(Letters(), stop=(letters[-1] + "never",))
    assert almost == Completion(text=letters, token_ids=tokens, finish_reason="length")
    # The prompt's own text ends nothing: the answer alone is looked at.
    assert answer(Letters(), prompt_ids=(9, 8), stop=("IH",)).finish_reason == "length"
    # A special token's text stands for the token, which decodes to nothing.
    special = Letters()
    special.special_ids = {"<end>": tokens[2]}
    first = tokens.index(tokens[2])
    ended = answer(special, stop=("<end>",))
    assert ended == Completion(text=letters[:first], token_ids=tokens[: first + 1], finish_reason="stop")


def test_pieces_are_streamed_as_they_become_certain() -> None:
    model = model_with_adapters()
    requests = mixed_requests(stop=("B", "XY"))
    pieces: list[tuple[int, str]] = []
    completions = generate_tokens(
        model, Letters(3), requests, batch_size=4, on_text=lambda i, piece: pieces.append((i, piece))
    )
    assert all(piece for _, piece in pieces)
    for i, completion in enumerate(completions):
        assert "".join(piece for index, piece in pieces if index == i) == completion.text
    pieces.clear()
    answers = generate(
        model, Letters(), ["AB", "C"], max_new_tokens=5, on_text=lambda i, piece: pieces.append((i, piece))
    )
    assert answers == ["".join(piece for index, piece in pieces if index == i) for i in range(2)]
    assert [index for index, _ in pieces] == [0, 1] * 5  # both grow at once


def test_the_mode_of_every_module_is_kept_and_nothing_is_dropped() -> None:
    model = model_with_adapters()
    expected = generate_tokens(model, Letters(), mixed_requests())
    model.train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert generate_tokens(model, Letters(), mixed_requests()) == expected
    assert [module.training for module in model.modules()] == modes

    def fail(index: int, piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_tokens(model, Letters(), mixed_requests(), on_text=fail)
    assert [module.training for module in model.modules()] == modes
    # The model can be trained right after.
    output = model(
        ModelInput(torch.tensor([1, 2, 3]), torch.tensor([0, 3]), (BatchConfig("qa", 0, 1),), torch.ones(3).long())
    )
    output[0].loss.backward()


def test_a_broken_adapter_ends_its_own_answers_only() -> None:
    model = model_with_adapters()
    expected = generate_tokens(model, Letters(), mixed_requests())
    next(iter(model.adapter_state("style").values())).fill_(math.nan)
    completions = generate_tokens(model, Letters(), mixed_requests())
    for i, (completion, sound) in enumerate(zip(completions, expected, strict=True)):
        if NAMES[i % len(NAMES)] == "style":
            assert completion == Completion(text="", token_ids=(), finish_reason="not_finite")
        else:
            assert completion == sound
    with pytest.raises(ValueError, match="adapter 'style' gives logits that are not finite"):
        generate(model, Letters(), ["A", "B"], adapter_names=["", "style"], max_new_tokens=3)


def test_dynamic_scaling_answers_beyond_the_trained_length() -> None:
    model = model_with_adapters(max_position_embeddings=8, rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0))
    requests = [Request(prompt_ids=(1, 2, 3, 4, 5, 6), max_new_tokens=8), Request(prompt_ids=(7,), max_new_tokens=20)]
    together = generate_tokens(model, Letters(), requests)
    assert together == [generate_tokens(model, Letters(), [request])[0] for request in requests]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"prompts": "HELLO"}, "prompts='HELLO' must be a list of prompts"),
        ({"prompts": ["A", ""]}, None),  # the tokenizer begins every text with a token
        ({"prompts": ["A", []]}, r"prompts\[1\]: \[\] must come to at least one token"),
        ({"prompts": [{"role": "user", "content": "x"}]}, r"prompts\[0\]: .* must be a text, a list of messages"),
        ({"prompts": ["A", [999]]}, r"requests\[1\]: token id 999 of the prompt must be in 0..vocab_size-1=60"),
        ({"prompts": ["A" * 40]}, "max_new_tokens=64 and a prompt of 41 must come to at most 64"),
        ({"adapter_names": "stile"}, "adapter 'stile' is not attached to this model; did you mean 'style'"),
        ({"adapter_names": ["qa"]}, "adapter_names has 1 entries for 2 prompts"),
        ({"adapter_names": ["qa", None]}, "adapter_name=None must be str"),
        ({"seed": [1, 2, 3]}, "seed has 3 entries for 2 prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1}, "temperature=-1.0 must be at least 0"),
        ({"top_p": 0}, "top_p=0.0 must be above 0"),
        ({"top_k": -3}, "top_k=-3 must be at least 0"),
        ({"stop": [""]}, "must hold no empty string"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_refusals(changes: dict, rule: str | None) -> None:
    model = model_with_adapters()
    arguments = {"prompts": ["A", "B"], "max_new_tokens": 5, **changes}
    if "A" * 40 in arguments["prompts"]:
        arguments["max_new_tokens"] = 64
    if rule is None:
        assert len(generate(model, Letters(), **arguments)) == 2
        return
    seen: list[str] = []
    with pytest.raises(ValueError, match=rule):
        generate(model, Letters(), **arguments, on_text=lambda _, piece: seen.append(piece))
    assert seen == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_answer_too(dtype: torch.dtype) -> None:
    completions = generate_tokens(model_with_adapters(dtype), Letters(), mixed_requests())
    assert [len(completion.token_ids) for completion in completions] == [4 + i % 3 for i in range(10)]


# On the real model.

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea, there lived",
]
CHATS = [
    [{"role": "user", "content": "Explain why the sky is blue."}],
    [
        {"role": "system", "content": "You answer briefly."},
        {"role": "user", "content": "Write a short story about a fox and a lighthouse."},
    ],
]


def smollm2_twin(model: LlamaForCausalLM) -> torch.nn.Module:
    """The same weights in transformers, which takes long to read the file; that it reads the same, tests/io shows."""
    path = resolve_source("smollm2-135m")
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        twin = transformers.LlamaForCausalLM(config)
    ours = {our_name(name): name for name in twin.state_dict()}
    weights = {ours[name]: weight for name, weight in model.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config)  # its table is no weight
    return twin.eval()


@pytest.mark.slow
def test_greedy_equals_transformers_on_smollm2(smollm2) -> None:
    model, tokenizer = smollm2
    twin = smollm2_twin(model)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in (*TEXTS, *CHATS)]
    requests = [Request(prompt_ids=tuple(prompt), max_new_tokens=64) for prompt in prompts]
    num_compared = 0
    for prompt, completion in zip(prompts, generate_tokens(model, tokenizer, requests), strict=True):
        answer = completion.token_ids
        assert len(answer) == 64 or answer[-1] in tokenizer.eos_token_ids
        # What transformers would say after our tokens, all at once: as long as it agrees, these are its own as well.
        with torch.no_grad():
            logits = twin(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2)
        close_calls = (best.values[:, 0] - best.values[:, 1] < 1e-3).nonzero().flatten().tolist()
        end = min([*close_calls, len(answer)])
        assert best.indices[:end, 0].tolist() == list(answer[:end])
        num_compared += end
    assert num_compared >= 200  # the prompts leave something to compare


def last_logits(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], followers: Sequence[int]) -> torch.Tensor:
    """Logits behind the prompts, and behind each follower put after them: ``[steps, prompts, vocab]``."""
    cache = KVCache(model.config_, len(prompts), 64, dtype=model.dtype, device=model.device)
    steps = []
    for tokens in [prompts, *([[follower]] * len(prompts) for follower in followers)]:
        ends = torch.tensor([0, *itertools.accumulate(map(len, tokens))], dtype=torch.int32)
        batch = ModelInput(torch.tensor([i for ids in tokens for i in ids]), ends, (BatchConfig("", 0, len(prompts)),))
        with torch.no_grad():
            steps.append(model(batch, last_logits_only=True, cache=cache)[0].logits)
    return torch.stack(steps)


def test_a_neighbour_hardly_moves_the_logits_on_smollm2(smollm2) -> None:
    model, tokenizer = smollm2
    prompts = [tokenizer.encode(text) for text in TEXTS]
    followers = tokenizer.encode(" and then 42.")
    together = last_logits(model, prompts, followers)
    for i, prompt in enumerate(prompts):
        alone = last_logits(model, [prompt], followers)[:, 0]
        assert (together[:, i] - alone).abs().max() <= 1e-4


def test_streamed_text_of_smollm2_is_its_decoded_text(smollm2) -> None:
    model, tokenizer = smollm2
    pieces: list[str] = []
    request = Request(
        prompt_ids=tuple(tokenizer.encode("Emoji: 🙂🙃🎉 日本語 naïve")),
        max_new_tokens=40,
        sampling=Sampling(temperature=3.0, seed=1),  # hot enough to write bytes that are no characters
    )
    completion = generate_tokens(model, tokenizer, [request], on_text=lambda _, piece: pieces.append(piece))[0]
    assert "".join(pieces) == completion.text == tokenizer.decode(completion.token_ids)
