"""A tokenizer from the ``tokenizer.json`` of a Hugging Face folder."""

from pathlib import Path

import tokenizers

from moe_peft.data.tokenizer_parts import FastBackend, TokenizerParts
from moe_peft.data.tokenizer_settings import read_tokenizer_settings


def read_hf_tokenizer(folder: Path) -> TokenizerParts:
    """Reads ``tokenizer.json`` and the settings beside it.

    What is put around a text is the file's own post-processor's business: ``add_bos_token`` and ``add_eos_token`` do
    not override it, as in transformers' fast tokenizers.

    Raises:
        ValueError: naming the file that cannot be understood.
    """
    path = folder / "tokenizer.json"
    settings = read_tokenizer_settings(folder)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from error
    # Cutting and padding are the caller's; a file saved with either switched on must not act on training data.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = settings.split_special_tokens
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in [
        *(settings.added_tokens[token_id] for token_id in sorted(settings.added_tokens)),
        *(token for token in settings.named_tokens.values() if token is not None),
        *settings.extra_special_tokens,
    ]:
        if token.content not in known:
            known.add(token.content)
            tokenizer.add_tokens([token])
    backend = FastBackend(tokenizer)
    special_tokens = {name: token.content for name, token in settings.named_tokens.items() if token is not None}
    # A name that no tokenizer file mentions may still be known from the model's config, by its id.
    by_id = {"bos_token": settings.bos_token_id, "eos_token": next(iter(settings.eos_token_ids), None)}
    for name, token_id in by_id.items():
        text = None if token_id is None else tokenizer.id_to_token(token_id)
        if name not in settings.named_tokens and text is not None:
            special_tokens[name] = text
    return TokenizerParts(
        backend=backend,
        special_tokens=special_tokens,
        eos_token_ids=settings.end_token_ids(backend.token_to_id(special_tokens.get("eos_token", ""))),
        chat_template=settings.chat_template,
        origin=str(folder),
    )
