"""Which tokens are learnt, against transformers' own mask of assistant tokens and against plain text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import byte_level_bpe, put_bos_before, sentencepiece_model, texts, write_folder
from tokenizers import processors
from transformers import AutoTokenizer

from moe_peft.data.records import parse_record
from moe_peft.data.supervision import encode_pieces, render_prompt, tokens_and_labels
from moe_peft.data.templates import load_template
from moe_peft.data.tokenizer import load_tokenizer

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It's 4."},
    {"role": "user", "content": "And 3?"},
    {"role": "assistant", "content": " 5\n\nor so\n"},
    {"role": "user", "content": "Thanks."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = byte_level_bpe(SPECIALS)
    put_bos_before(tokenizer, "<s>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": CHATML}
    return write_folder(
        tmp_path_factory.mktemp("tok"),
        tokenizer,
        tokenizer_config={**config, "eos_token": "</s>"},
        generation_config={"eos_token_id": [1, 3]},
    )


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def with_template(folder, tmp_path_factory):
    """The same tokenizer with another chat template."""

    def load(template):
        other = tmp_path_factory.mktemp("other")
        for file in folder.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        (other / "chat_template.jinja").write_text(template, encoding="utf-8")
        return load_tokenizer(other)

    return load


def learnt(tokenizer, ids, labels):
    """The stretches that are learnt, as text."""
    assert len(ids) == len(labels)
    assert all(label in (-100, token_id) for token_id, label in zip(ids, labels, strict=True))
    stretches, last = [], None
    for position, label in enumerate(labels):
        if label != -100:
            if last != position - 1:
                stretches.append([])
            stretches[-1].append(label)
            last = position
    return [tokenizer.decode(stretch, skip_special_tokens=False) for stretch in stretches]


@pytest.mark.parametrize("name", ["alpaca", "moe_peft"])
def test_an_instruction(tokenizer, name):
    template = load_template(name)
    record = parse_record({"instruction": "Add {input}.", "input": "2 2", "output": "It's 4.\n"})
    ids, labels = tokens_and_labels(record, tokenizer, template)
    prompt = template.prompt("Add {input}.", "2 2")
    assert ids == [0, *tokenizer.encode(prompt + "It's 4.\n", add_special_tokens=False), 1]
    assert learnt(tokenizer, ids, labels) == ["It's 4.\n</s>"]
    assert render_prompt(record, tokenizer, template) == tokenizer.encode(prompt) == ids[: labels.count(-100)]


def test_an_answer_that_ends_itself_gets_no_second_end(tokenizer):
    record = parse_record({"instruction": "Add.", "output": "4</s>"})
    ids, labels = tokens_and_labels(record, tokenizer, load_template("alpaca"))
    assert ids[-2:] == [*tokenizer.encode("4", add_special_tokens=False), 1]
    assert learnt(tokenizer, ids, labels) == ["4</s>"]


def test_a_text_is_learnt_but_for_its_bos(tokenizer):
    ids, labels = tokens_and_labels(parse_record({"text": "The cat sat."}), tokenizer, load_template("alpaca"))
    assert ids == [*tokenizer.encode("The cat sat."), 1]
    assert labels == [-100, *ids[1:]]


def test_a_conversation_equals_transformers_mask(tokenizer, folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = tokens_and_labels(parse_record({"messages": CHAT}), tokenizer, load_template("alpaca"))
    assert ids == expected["input_ids"]
    assert [int(label != -100) for label in labels] == expected["assistant_masks"]
    assert learnt(tokenizer, ids, labels) == ["It's 4.<|im_end|>", " 5\n\nor so\n<|im_end|>"]


TURNS = st.lists(st.tuples(texts(), texts().filter(str.strip)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(TURNS)
def test_any_conversation_equals_transformers_mask(pair, turns):
    tokenizer, theirs = pair
    messages = [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    record = parse_record({"messages": messages})
    ids, labels = tokens_and_labels(record, tokenizer, load_template("alpaca"))
    assert ids == expected["input_ids"]
    assert [int(label != -100) for label in labels] == expected["assistant_masks"]
    prompt = render_prompt(record, tokenizer, load_template("alpaca"))
    assert prompt == render_prompt(messages[:-1], tokenizer, load_template("alpaca"))
    assert prompt == theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    if not messages[-1]["content"][0].isspace():  # which can be one token with the newline that ends the prompt
        assert ids[: len(prompt)] == prompt


@pytest.fixture(scope="module")
def pair(tokenizer, folder):
    return tokenizer, AutoTokenizer.from_pretrained(folder)


def test_the_chat_template_for_an_instruction(tokenizer):
    template = load_template("chat")
    record = parse_record({"instruction": "Add.", "input": "2 2", "output": "4"})
    ids, labels = tokens_and_labels(record, tokenizer, template)
    user = {"role": "user", "content": "Add.\n\n2 2"}
    assert ids == tokenizer.apply_chat_template([user, {"role": "assistant", "content": "4"}])
    assert learnt(tokenizer, ids, labels) == ["4<|im_end|>"]
    assert render_prompt(record, tokenizer, template) == tokenizer.apply_chat_template(
        [user], add_generation_prompt=True
    )


def test_a_sentencepiece_conversation(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write_folder(tmp_path, tokenizer_config={"chat_template": LLAMA2})
    tokenizer = load_tokenizer(tmp_path)
    record = parse_record({"messages": CHAT[1:5]})
    ids, labels = tokens_and_labels(record, tokenizer, load_template("alpaca"))
    assert ids == tokenizer.apply_chat_template(CHAT[1:5])
    assert learnt(tokenizer, ids, labels) == ["It's 4. </s>", "5\n\nor so </s>"]
    record = parse_record({"instruction": "Add.", "output": "4"})
    ids, labels = tokens_and_labels(record, tokenizer, load_template("moe_peft"))
    assert ids[0] == 1
    assert learnt(tokenizer, ids, labels) == ["4</s>"]
    prompt = render_prompt(record, tokenizer, load_template("moe_peft"))
    assert ids[: len(prompt)] == prompt


TURNS_AS_TEXT = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
UNSTABLE = {
    "forgets answers": "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}{{ messages[-1] }}",
    "another prompt": TURNS_AS_TEXT + "{% if add_generation_prompt %}bot:{% endif %}",
    "an end of its own": TURNS_AS_TEXT + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    "the number of turns": "{{ messages | length }}" + TURNS_AS_TEXT,
}


@pytest.mark.parametrize("template", UNSTABLE.values(), ids=UNSTABLE)
def test_a_template_that_is_not_prefix_stable_is_refused(with_template, template):
    with pytest.raises(ValueError, match=r"the chat template is not prefix-stable at messages\[\d\]"):
        tokens_and_labels(parse_record({"messages": CHAT}), with_template(template), load_template("alpaca"))


def test_an_end_token_that_no_file_names_is_found(with_template):
    tokenizer = with_template(CHATML.replace("<|im_end|>", "<|im_start|>"))
    assert 2 not in tokenizer.eos_token_ids
    ids, labels = tokens_and_labels(parse_record({"messages": CHAT}), tokenizer, load_template("alpaca"))
    assert learnt(tokenizer, ids, labels) == ["It's 4.<|im_start|>", " 5\n\nor so\n<|im_start|>"]


def test_without_an_end_token_the_whole_turn_is_learnt(with_template):
    tokenizer = with_template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    ids, labels = tokens_and_labels(parse_record({"messages": CHAT[:3]}), tokenizer, load_template("alpaca"))
    assert learnt(tokenizer, ids, labels) == [" It's 4.\n\n"]


@settings(deadline=None, max_examples=200)
@given(pieces=st.lists(st.tuples(texts(*SPECIALS), st.booleans()), max_size=4))
def test_pieces(tokenizer, pieces):
    ids, labels = encode_pieces(tokenizer, pieces)
    whole = "".join(text for text, _ in pieces)
    assert ids == tokenizer.encode(whole, add_special_tokens=False)
    assert len(labels) == len(ids)
    assert all(label in (-100, token_id) for token_id, label in zip(ids, labels, strict=True))
    if all(supervised for _, supervised in pieces):
        assert labels == ids
    if not any(supervised for _, supervised in pieces):
        assert labels == [-100] * len(ids)


@settings(deadline=None, max_examples=200)
@given(prompt=texts(*SPECIALS), answer=texts(*SPECIALS))
def test_what_is_not_learnt_is_what_the_prompt_is_alone(tokenizer, prompt, answer):
    ids, labels = encode_pieces(tokenizer, [(prompt, False), (answer, True)])
    alone = tokenizer.encode(prompt, add_special_tokens=False)
    first = next((i for i, label in enumerate(labels) if label != -100), len(labels))
    assert -100 not in labels[first:]
    assert ids[:first] == alone[:first]
    if answer:  # a token across the border is the answer's
        assert first == len(alone) or first == len(ids) or ids[first] != alone[first]


def test_a_token_across_the_border_is_the_answer_s(tokenizer):
    (question,) = tokenizer.encode("question", add_special_tokens=False)
    ids, labels = encode_pieces(tokenizer, [("quest", False), ("ion 5", True)])
    assert ids[0] == question
    assert labels == ids


def test_a_tokenizer_that_ends_every_text_itself(tmp_path):
    inner = byte_level_bpe(SPECIALS)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = load_tokenizer(write_folder(tmp_path, inner, tokenizer_config=config))
    assert tokenizer.encode("the")[-1] == 1
    record = parse_record({"instruction": "Add.", "output": "4"})
    ids, _ = tokens_and_labels(record, tokenizer, load_template("moe_peft"))
    prompt = render_prompt(record, tokenizer, load_template("moe_peft"))
    assert ids == [*prompt, *tokenizer.encode("4", add_special_tokens=False), 1]
    assert 1 not in prompt


def test_no_end_token(tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level_bpe(SPECIALS)))
    with pytest.raises(ValueError, match="the tokenizer has no end token"):
        tokens_and_labels(parse_record({"text": "x"}), tokenizer, load_template("alpaca"))
    with pytest.raises(ValueError, match="has no chat template"):
        tokens_and_labels(parse_record({"messages": CHAT}), tokenizer, load_template("alpaca"))


def test_a_text_has_no_prompt(tokenizer):
    with pytest.raises(ValueError, match="a text record has no prompt"):
        render_prompt(parse_record({"text": "x"}), tokenizer, load_template("alpaca"))
