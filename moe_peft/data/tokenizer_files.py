"""A tokenizer written as the files of a Hugging Face folder."""

import json
from typing import Any

from moe_peft.data.tokenizer import Tokenizer

# What a pipeline that differs from the tokenizer would show itself on.
_PROBES = (
    "",
    "a",
    " a",
    "Hello, world! It's 2024: 3.14 and 1000000.",
    "  two  spaces,\ttabs\n\nand lines \r\n",
    "def f(x):\n    return x ** 2  # it's we'll don't",
    "naïve café Größe ﬁ ½ e\u0301",
    "日本語のテキスト 한국어 العربية 🙂👩‍👩‍👧",
    "\u00a0\u200b<s></s>[INST]<|x|>",
)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """``tokenizer.json`` and ``tokenizer_config.json`` of a tokenizer: their names with their texts.

    Raises:
        ValueError: when no pipeline of the ``tokenizers`` library gives the ids that this tokenizer gives.
    """
    pipeline = tokenizer.to_tokenizers()
    specials = [f"{left}{text}{right}" for text in tokenizer.special_ids for left, right in (("", ""), ("a ", " b"))]
    # Every token once amid others: a vocabulary may hold pieces that are matched before anything is merged.
    tokens = [f"x{tokenizer.decode([i], skip_special_tokens=False)}y" for i in range(tokenizer.vocab_size)]
    for probes, add in (((*_PROBES, *specials), True), ((*_PROBES, *specials, *tokens), False)):
        for probe in probes:
            found, expected = pipeline.encode(probe, add_special_tokens=add).ids, tokenizer.encode(probe, add)
            if found != expected:
                raise ValueError(
                    f"the tokenizer of {tokenizer.origin} cannot be written as tokenizer.json: for {probe!r} that "
                    f"would give the ids {found}, and not {expected}"
                )
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    return {
        "tokenizer.json": pipeline.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }
