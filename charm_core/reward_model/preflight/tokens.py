"""Rules about special tokens and padding.

Much of what goes wrong elsewhere does no harm here, because CHARM tokenises what the template wrote without adding anything,
pads on the right, masks the padding and finds the last token by its position. Such facts are told as ``info``.
"""

from collections.abc import Iterator
from importlib.metadata import version

from tokenizers import Tokenizer

from charm_core.reward_model.findings import Finding
from charm_core.reward_model.preflight.facts import Facts, finding

SAMPLE = "What is 12 + 30?\n\nIt's 42: don't you  agree? Größe, 日本語, naïve café 🙂."
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")
"""How names of input embeddings end."""


def pad_token(facts: Facts) -> Iterator[Finding]:
    """There is a pad token, it is not the end-of-text token, and it has an embedding."""
    tokenizer = facts.tokenizer
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None and end is None:
        yield finding(
            "pad-token",
            "error",
            f"the tokenizer of {tokenizer.name_or_path!r} has neither a pad token nor an end-of-text token; set pad_token in its "
            "tokenizer_config.json to a token of its vocabulary",
        )
    elif pad is None:
        yield finding(
            "pad-token",
            "info",
            f"the tokenizer of {tokenizer.name_or_path!r} has no pad token. CHARM pads with the end-of-text token and masks it: no score "
            "changes. Tools that use transformers' own pooling refuse batches of more than one text, or need pad_token_id in config.json",
        )
    elif pad == end:
        yield finding(
            "pad-token",
            "info",
            f"the pad token {tokenizer.pad_token!r} is the end-of-text token. CHARM finds the last token by its position: no score "
            "changes. Tools that look for the first pad token may read the score at the wrong place",
        )


def ids_have_embeddings(facts: Facts) -> Iterator[Finding]:
    """No token id that can occur lies beyond the rows of the embedding."""
    rows = [
        tensor.shape[0]
        for model in (facts.files.model, facts.files.base)
        if model is not None
        for name, tensor in model.tensors.items()
        if name.endswith(EMBEDDINGS)
    ]
    added = facts.tokenizer.get_added_vocab()
    beyond = sorted((number, token) for token, number in added.items() if rows and number >= max(rows))
    if beyond:
        padding = facts.tokenizer.pad_token_id in {number for number, _ in beyond}
        yield finding(
            "embedding-rows",
            "error" if padding else "warning",
            f"the embedding of the reward model has {max(rows)} rows, but its tokenizer knows the token {beyond[0][1]!r} with the id "
            f"{beyond[0][0]}{', which pads' if padding else ''}: scoring a text with it would fail. Set pad_token in "
            "tokenizer_config.json to a token that has an embedding (the end-of-text token, say), or take the "
            "tokenizer that belongs to the weights",
        )


def padding_side(facts: Facts) -> Iterator[Finding]:
    """The tokenizer pads on the side that pooling by the last token needs."""
    if facts.tokenizer.padding_side == "left":
        yield finding(
            "padding-side",
            "info",
            f"the tokenizer of {facts.tokenizer.name_or_path!r} pads on the left, while pooling finds the last token by counting from the "
            "left. CHARM pads on the right whatever the tokenizer says: no score changes. Elsewhere set padding_side='right'",
        )


def tokenizer_as_stored(facts: Facts) -> Iterator[Finding]:
    """What transformers makes of the tokenizer splits text as the stored tokenizer.json does."""
    file = facts.files.tokenizer.folder / "tokenizer.json"
    if not file.is_file():
        return
    stored = Tokenizer.from_file(str(file)).encode(SAMPLE, add_special_tokens=False).ids
    if stored != facts.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]:
        yield finding(
            "tokenizer",
            "warning",
            f"transformers {version('transformers')} loads the tokenizer of {facts.files.tokenizer.name!r} as a "
            f"{type(facts.tokenizer).__name__}, which splits text otherwise than the tokenizer.json stored with the weights. Set "
            "tokenizer_class to 'TokenizersBackend' in tokenizer_config.json to have the stored one, or compare a few scores with those "
            "that the model's authors publish",
        )


def bos_doubled(facts: Facts) -> Iterator[Finding]:
    """A text does not begin with two BOS tokens."""
    bos = facts.tokenizer.bos_token_id
    if bos is None or not facts.renders_chats:
        return
    if facts.example_ids[:2] == [bos, bos]:
        yield finding(
            "bos-doubled",
            "warning",
            f"the chat template writes the token {facts.tokenizer.bos_token!r} twice at the beginning of every text, which reward models "
            "are hardly ever trained with. Give a template that writes it once as reward_model.chat_template",
        )
    elif facts.example_ids[:1] == [bos] and facts.tokenizer("a")["input_ids"][:1] == [bos]:
        yield finding(
            "bos-doubled",
            "info",
            f"both the chat template and the tokenizer write {facts.tokenizer.bos_token!r}. CHARM tokenises what the template wrote "
            "without adding to it: texts begin with one. Elsewhere tokenise with add_special_tokens=False",
        )


def bos_missing(facts: Facts) -> Iterator[Finding]:
    """Where the tokenizer begins plain text with BOS, so does the chat template."""
    bos = facts.tokenizer.bos_token_id
    if bos is None or not facts.renders_chats:
        return
    if facts.tokenizer("a")["input_ids"][:1] == [bos] and bos not in facts.example_ids[:1]:
        yield finding(
            "bos-missing",
            "warning",
            f"the tokenizer begins plain text with {facts.tokenizer.bos_token!r}, so the model was most likely trained with it, but "
            "the chat template does not write it. If so, give a template that begins with {{ bos_token }} as reward_model.chat_template",
        )
