"""A reward model small enough to train from nothing in seconds: for the simulated arena and for tests."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForSequenceClassification

from charm_core.errors import ConfigError

_PAD, _UNKNOWN, _END = "<pad>", "<unknown>", "<end>"
_ROLES = ("<system>", "<user>", "<assistant>")
_MESSAGE = "{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}"
_CHAT_TEMPLATE = "{% for message in messages %}" + _MESSAGE + "{% endfor %}" + _END


def build_tiny_reward_model(
    vocabulary: Sequence[str],
    folder: Path,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    layers: int = 2,
    max_length: int = 128,
) -> None:
    """Write an untrained decoder classifier of the Qwen3 type with one label, as a plain Hugging Face folder.

    Its tokenizer knows whole words and has a chat template, and its score is read from the last token: it takes the
    same path through scoring and training as large reward models do.

    Args:
        vocabulary: Every word and punctuation mark that it can tell apart; others become one unknown token.
        folder: Where to write; made if need be.
        seed: Seed of the weights. The same arguments give the same files; the global generator is left as it was.
        hidden_size: Width; a multiple of 16.
        layers: Transformer layers.
        max_length: Most tokens of a text.

    Raises:
        ConfigError: Words that occur twice, or a width that is not a multiple of 16.
    """
    if len(set(vocabulary)) != len(vocabulary) or hidden_size % 16:
        raise ConfigError(
            "a tiny reward model needs distinct words and a width that is a multiple of 16, not "
            f"{len(vocabulary)} words of which {len(set(vocabulary))} are distinct and a width of {hidden_size}"
        )
    tokenizer = word_tokenizer(vocabulary, max_length)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=max_length,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word_tokenizer(vocabulary: Sequence[str], max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with a chat template and an end-of-text token; other words are one unknown token."""
    words = (_PAD, _UNKNOWN, _END, *_ROLES, *vocabulary)
    words_to_ids = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=_UNKNOWN))
    words_to_ids.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        additional_special_tokens=list(_ROLES),
        model_max_length=max_length,
        padding_side="right",
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
