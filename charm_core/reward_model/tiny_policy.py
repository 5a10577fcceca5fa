"""A policy model small enough to be taught from nothing in seconds: for the simulated arena and for tests.

It learns to write as the simulated writers do, all of them mixed, and is then a policy model like any other: it answers
conversations through its chat template and can be sampled and post-trained by the same code as a large one.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from tokenizers import decoders
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from charm_core.errors import ConfigError
from charm_core.reward_model.post_training_job import TinyPolicyJob
from charm_core.reward_model.templates import chat_ids
from charm_core.reward_model.tiny import word_tokenizer

logger = logging.getLogger(__name__)

_MESSAGE = "{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}"
_CHAT_TEMPLATE = (
    "{% for message in messages %}" + _MESSAGE + "{% if message['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
_IGNORED = -100
_LOG_EVERY = 50


def teach_tiny_policy_model(job: TinyPolicyJob, prompts: pl.DataFrame, responses: pl.DataFrame) -> None:
    """Make a tiny causal language model, teach it to answer as given, and write it as a plain Hugging Face folder.

    Args:
        job: Its size and how long it is taught. The same job and texts give the same weights on one machine.
        prompts: PROMPTS.
        responses: RESPONSES to them; who wrote which is not told.

    Raises:
        ConfigError: Words that occur twice, or a width that is not a multiple of 16.
    """
    model, tokenizer = _untaught(job)
    texts = _read_texts(tokenizer, prompts, responses)
    batches = [
        batch
        for epoch in range(job.config.epochs)
        for batch in _batches(texts, job.config.texts_per_step, job.config.seed + epoch)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.config.learning_rate, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=job.config.learning_rate, total_steps=len(batches), pct_start=0.05
    )
    model.train()
    for step, rows in enumerate(batches):
        loss = model(**_padded(rows, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        if step % _LOG_EVERY == 0 or step == len(batches) - 1:
            logger.info("step %d of %d: loss %.4f", step + 1, len(batches), float(loss.detach()))
    model.eval().save_pretrained(job.output_dir)
    tokenizer.save_pretrained(job.output_dir)


def _untaught(job: TinyPolicyJob) -> tuple[Any, PreTrainedTokenizerFast]:
    if len(set(job.vocabulary)) != len(job.vocabulary) or job.config.hidden_size % 16:
        raise ConfigError(
            "a tiny policy model needs distinct words and a width that is a multiple of 16, not "
            f"{len(job.vocabulary)} words of which {len(set(job.vocabulary))} are distinct and a width of {job.config.hidden_size}"
        )
    tokenizer = word_tokenizer(job.vocabulary, job.config.max_length)
    tokenizer.chat_template = _CHAT_TEMPLATE
    # words with a space between them and none before a full stop: as the writers write
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=job.config.hidden_size,
        intermediate_size=2 * job.config.hidden_size,
        num_hidden_layers=job.config.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=job.config.hidden_size // 4,
        max_position_embeddings=job.config.max_length,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.config.seed)
        return Qwen3ForCausalLM(config), tokenizer


def _read_texts(tokenizer: Any, prompts: pl.DataFrame, responses: pl.DataFrame) -> list[tuple[list[int], int]]:
    """Token ids of prompt and response, and where the response begins."""
    texts = []
    for messages, response in responses.join(prompts, on="prompt_id").select("messages", "response").iter_rows():
        asked = len(chat_ids(tokenizer, messages, answer_begins=True))
        ids = chat_ids(tokenizer, [*messages, {"role": "assistant", "content": response}])
        texts.append((ids, asked))
    return texts


def _batches(texts: Sequence[tuple[list[int], int]], size: int, seed: int) -> Iterator[list[tuple[list[int], int]]]:
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    for start in range(0, len(order), size):
        yield [texts[place] for place in order[start : start + size]]


def _padded(rows: Sequence[tuple[list[int], int]], pad: int) -> dict[str, Tensor]:
    """Padded ids, mask, and labels of the responses alone."""
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor(
            [[_IGNORED] * asked + ids[asked:] + [_IGNORED] * (width - len(ids)) for ids, asked in rows]
        ),
    }
