"""Data sets of samples: truncation, records that do not fit, and the counts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import byte_level_bpe, put_bos_before, write_folder

from moe_peft.data.records import TextRecord, parse_record
from moe_peft.data.samples import build_samples, load_samples, render_prompt
from moe_peft.data.supervision import tokens_and_labels
from moe_peft.data.templates import load_template
from moe_peft.data.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RECORDS = [
    parse_record({"instruction": "Name the animal that sat on the mat.", "input": "The cat.", "output": "cat"}, 1),
    parse_record({"instruction": "Count.", "output": "one two three four five"}, 4),
    parse_record({"text": "The cat sat on the mat."}, 7),
    parse_record({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}, 9),
]
TEMPLATE = load_template("moe_peft")


def make(folder, bos):
    tokenizer = byte_level_bpe(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    if bos:
        put_bos_before(tokenizer, "<s>")
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    return load_tokenizer(write_folder(folder, tokenizer, tokenizer_config=config))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {bos: make(tmp_path_factory.mktemp("tok"), bos) for bos in (False, True)}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers[True]


def test_counts(tokenizer):
    made = build_samples(RECORDS, tokenizer, TEMPLATE, 512)
    assert made.records == tuple(RECORDS)
    pairs = [tokens_and_labels(record, tokenizer, TEMPLATE) for record in RECORDS]
    assert [(list(s.input_ids), list(s.labels), s.num_truncated) for s in made.samples] == [
        (i, la, 0) for i, la in pairs
    ]
    assert (made.num_truncated, made.num_skipped) == (0, 0)
    assert made.num_tokens == sum(len(ids) for ids, _ in pairs)
    assert made.num_supervised_tokens == sum(label != -100 for _, labels in pairs for label in labels)


def test_a_first_token_is_never_predicted_and_so_not_counted(tokenizers):
    made = build_samples([RECORDS[2]], tokenizers[False], TEMPLATE, 512)
    assert made.samples[0].labels == made.samples[0].input_ids
    assert made.num_supervised_tokens == made.samples[0].num_supervised_tokens == made.num_tokens - 1


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("record", RECORDS[:2] + RECORDS[3:], ids=["input", "no_input", "chat"])
def test_every_cutoff(tokenizers, bos, record):
    tokenizer = tokenizers[bos]
    ids, labels = tokens_and_labels(record, tokenizer, TEMPLATE)
    first = next(i for i, label in enumerate(labels) if label != -100)
    has_bos = ids[0] == tokenizer.bos_token_id
    for cutoff_len in range(2, len(ids) + 2):
        if cutoff_len < len(ids) - first + 1:  # no room for the answer and one token before it
            with pytest.raises(ValueError, match="too long"):
                build_samples([record], tokenizer, TEMPLATE, cutoff_len)
            continue
        made = build_samples([record], tokenizer, TEMPLATE, cutoff_len)
        (sample,) = made.samples
        excess = max(0, len(ids) - cutoff_len)
        expected = ids if not excess else [ids[0], *ids[1 + excess :]] if has_bos else ids[excess:]
        assert list(sample.input_ids) == expected
        assert len(sample.labels) == len(sample.input_ids) <= cutoff_len
        assert [x for x in sample.labels if x != -100] == [x for x in labels if x != -100]
        assert sample.labels[-(len(ids) - first) :] == tuple(labels[first:])
        assert sample.num_truncated == excess
        assert made.num_truncated == bool(excess)


def test_a_text_is_never_cut(tokenizer):
    length = len(tokens_and_labels(RECORDS[2], tokenizer, TEMPLATE)[0])
    assert build_samples([RECORDS[2]], tokenizer, TEMPLATE, length).num_truncated == 0
    with pytest.raises(ValueError, match=r"line 7: \d+ tokens"):
        build_samples([RECORDS[2]], tokenizer, TEMPLATE, length - 1)


def test_too_long_is_named_with_file_line_and_lengths(tokenizer):
    ids, labels = tokens_and_labels(RECORDS[1], tokenizer, TEMPLATE)
    answer = sum(label != -100 for label in labels)
    with pytest.raises(ValueError) as caught:
        build_samples(RECORDS[:2], tokenizer, TEMPLATE, answer, source="train.jsonl")
    message = str(caught.value)
    assert message.startswith(f"train.jsonl has records too long for cutoff_len={answer} (")
    assert "overlong: skip" in message
    assert f"line 4: {len(ids)} tokens, {answer} of them from the beginning of the answer on" in message
    assert "line 1:" not in message


def test_too_long_is_skipped_and_counted(tokenizer):
    answer = sum(label != -100 for label in tokens_and_labels(RECORDS[1], tokenizer, TEMPLATE)[1])
    made = build_samples(RECORDS[:2], tokenizer, TEMPLATE, answer, "skip")
    assert made.num_skipped == 1
    assert made.records == (RECORDS[0],)
    assert len(made.samples) == 1
    with pytest.raises(
        ValueError, match=r"nothing is left to learn from x\.jsonl: all 2 records are too long for cutoff_len=2"
    ):
        build_samples(RECORDS[:2], tokenizer, TEMPLATE, 2, "skip", "x.jsonl")


def test_unusable_records_are_named_whatever_is_skipped(tokenizers, tmp_path):
    no_chat = load_tokenizer(write_folder(tmp_path, byte_level_bpe(["</s>"]), tokenizer_config={"eos_token": "</s>"}))
    with pytest.raises(ValueError, match=r"x\.jsonl has unusable records, 1 of 4:\n  line 9: .* has no chat template"):
        build_samples(RECORDS, no_chat, TEMPLATE, 512, "skip", "x.jsonl")
    with pytest.raises(ValueError, match=r"unusable records, 2 of 2:\n  line 1: .* has no chat template"):
        build_samples(RECORDS[:2], no_chat, load_template("chat"), 512)


def test_a_record_with_nothing_to_learn(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    tokenizer = load_tokenizer(write_folder(tmp_path, byte_level_bpe(["</s>"]), tokenizer_config={"eos_token": "</s>"}))
    with pytest.raises(ValueError, match="line 9: there is no token to learn"):
        build_samples(RECORDS, tokenizer, TEMPLATE, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((512, "skp"), "overlong='skp' must be one of error, skip"),
        ((1, "error"), "cutoff_len=1 must be at least 2"),
    ],
)
def test_bad_settings(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_samples(RECORDS, tokenizer, TEMPLATE, *arguments)


def test_no_records(tokenizer):
    with pytest.raises(ValueError, match="nothing is left to learn from the data: it has no records"):
        build_samples([], tokenizer, TEMPLATE, 64)


def test_load_samples(tokenizer, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"instruction": "Add.", "output": "4"}, {"text": "The cat."}], indent=1))
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"prompt_input": "{instruction}{input}>", "prompt_no_input": "{instruction}>"}))
    made = load_samples(str(path), tokenizer, template=str(own), cutoff_len=64, overlong="error")
    assert made.samples == build_samples(made.records, tokenizer, load_template(own), 64).samples
    prompt = render_prompt(made.records[0], tokenizer, load_template(own))
    assert prompt == tokenizer.encode("Add.>")
    assert list(made.samples[0].input_ids[: len(prompt)]) == prompt
    with pytest.raises(
        ValueError, match=r"train\.json has records too long for cutoff_len=2 .*\n  line 2: .*\n  line 6: "
    ):
        load_samples(str(path), tokenizer, template=str(own), cutoff_len=2, overlong="error")
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*train\.json'\?"):
        load_samples(str(tmp_path / "trian.json"), tokenizer, template="alpaca", cutoff_len=64, overlong="error")
    with pytest.raises(ValueError, match="template='alpacca'"):
        load_samples(str(path), tokenizer, template="alpacca", cutoff_len=64, overlong="error")


ANSWERS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(str.strip)


@settings(deadline=None, max_examples=100)
@given(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
    ANSWERS,
    st.sampled_from(["alpaca", "moe_peft", "chat"]),
)
def test_a_sample_begins_with_its_prompt_or_what_both_share(tokenizer, instruction, output, name):
    template = load_template(name)
    record = parse_record({"instruction": instruction, "output": output})
    made = build_samples([record], tokenizer, template, 512)
    ids, labels = made.samples[0].input_ids, made.samples[0].labels
    prompt = render_prompt(record, tokenizer, template)
    first = next(i for i, label in enumerate(labels) if label != -100)
    assert list(ids[:first]) == prompt[:first]
    text = tokenizer.decode(ids[first:], skip_special_tokens=False)
    if first == len(prompt):
        assert text == output + ("<|im_end|>\n" if name == "chat" else "</s>")


def test_bundled_data(tokenizer, monkeypatch, tmp_path):
    path = tmp_path / "tale.jsonl"
    path.write_text('{"text": "The cat."}\n')
    monkeypatch.setattr("moe_peft.data.samples.bundled_records_path", {"bundled:tale": path}.__getitem__)
    made = load_samples("bundled:tale", tokenizer, template="alpaca", cutoff_len=64, overlong="error")
    assert made.records == (TextRecord(text="The cat.", line=1),)
