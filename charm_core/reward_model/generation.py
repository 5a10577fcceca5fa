"""Responses of a policy model with transformers' ``generate``: one answer per prompt, the same whatever is answered with it.

Every prompt draws from random numbers of its own, so an answer depends on the prompt, the decoding and its seed, and on the
batch that it is in only through rounding. Of 1,500 answers of a tiny model (64,000 tokens) none changed with the batch size
in float32, and a third did in bfloat16, as they would from one GPU to another. Of the model's own generation settings only
its end-of-text tokens count: top_k, repetition penalties and the like would make another decoding of every policy model.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from charm_core.errors import ModelError
from charm_core.reward_model.generation_job import PolicyModelSpec
from charm_core.reward_model.loading import arithmetic_dtype, default_device
from charm_core.reward_model.pretrained import pad_token_id
from charm_core.reward_model.templates import chat_ids, uses_chat_template
from charm_core.sampling import Answer, Decoding, conversation, request_seed, status_of

logger = logging.getLogger(__name__)

BATCHES_PER_WINDOW = 8
"""Prompts are taken in order, so many batches at a time, and sorted by length within them: little padding, and the first
prompts are answered first."""
_TAIL_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class PolicyNetwork:
    """A loaded policy model."""

    network: Any
    tokenizer: Any
    pad_token_id: int
    end_token_ids: frozenset[int]
    max_length: int
    """Most tokens of prompt and response."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A prompt as the policy model reads it."""

    prompt_id: str
    input_ids: list[int]
    seed: int | None


def generate_answers(spec: PolicyModelSpec, decoding: Decoding, prompts: pl.DataFrame) -> Iterator[list[Answer]]:
    """Answer prompts, batch by batch.

    Args:
        spec: The policy model.
        decoding: How to answer.
        prompts: ``prompt_id`` and ``messages``.

    Yields:
        The answers of a batch. A prompt that leaves no room for a response, or that the chat template refuses, is a failed
        answer.

    Raises:
        ModelError: The model cannot be used.
    """
    model = load_policy_model(spec)
    rows = prompts.select("prompt_id", "messages")
    for window in rows.iter_slices(BATCHES_PER_WINDOW * spec.batch_size):
        texts: list[Rendered] = []
        impossible: list[Answer] = []
        for prompt_id, messages in window.iter_rows():
            result = render_prompt(model, decoding, prompt_id, messages)
            texts.append(result) if isinstance(result, Rendered) else impossible.append(result)
        if impossible:
            yield impossible
        texts.sort(key=lambda text: -len(text.input_ids))
        for start in range(0, len(texts), spec.batch_size):
            yield answer_batch(model, decoding, texts[start : start + spec.batch_size])


def load_policy_model(spec: PolicyModelSpec) -> PolicyNetwork:
    """Load a policy model, on the GPU if there is one.

    Raises:
        ModelError: Not a causal language model in safetensors, or without a chat template or an end-of-text token.
    """
    device = default_device()
    options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.path, padding_side="left", **options)
        network = AutoModelForCausalLM.from_pretrained(
            spec.path, dtype=arithmetic_dtype(spec.dtype, device), use_safetensors=True, **options
        )
    except Exception as error:
        raise ModelError(f"the policy model {spec.path!r} cannot be loaded: {error}") from error
    if not uses_chat_template(tokenizer):
        raise ModelError(
            f"the tokenizer of the policy model {spec.path!r} has no chat template, so how to ask it is unknown; a base model "
            "does not answer: put a chat_template.jinja into its folder if it does"
        )
    ends = _end_token_ids(network, tokenizer)
    if not ends:
        raise ModelError(f"the policy model {spec.path!r} names no end-of-text token, so no answer would end")
    network.generation_config = GenerationConfig()
    return PolicyNetwork(
        network=network.to(device).eval(),
        tokenizer=tokenizer,
        pad_token_id=pad_token_id(tokenizer),
        end_token_ids=ends,
        max_length=_longest(network, tokenizer),
    )


def _end_token_ids(network: Any, tokenizer: Any) -> frozenset[int]:
    stated = getattr(network.generation_config, "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [stated]
    return frozenset(int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None)


def _longest(network: Any, tokenizer: Any) -> int:
    """Most tokens of a text, by the model and its tokenizer."""
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    limit = int(tokenizer.model_max_length)
    return min(limit, positions) if positions else limit


def render_prompt(
    model: PolicyNetwork, decoding: Decoding, prompt_id: str, messages: Sequence[dict[str, str]]
) -> Rendered | Answer:
    """A prompt's tokens, or the answer that says why there are none."""
    try:
        ids = chat_ids(model.tokenizer, conversation(messages, decoding.system_prompt), answer_begins=True)
    except ModelError as error:
        return Answer(prompt_id=prompt_id, response="", status="failed", reason=str(error))
    if len(ids) >= model.max_length:
        reason = f"the prompt has {len(ids)} tokens, and the model takes {model.max_length} with the response"
        return Answer(prompt_id=prompt_id, response="", status="failed", reason=reason, prompt_tokens=len(ids))
    return Rendered(prompt_id=prompt_id, input_ids=ids, seed=request_seed(decoding.seed, prompt_id))


def answer_batch(model: PolicyNetwork, decoding: Decoding, texts: Sequence[Rendered]) -> list[Answer]:
    """Answer some prompts together; answers in the order of the prompts."""
    longest = max(len(text.input_ids) for text in texts)
    limits = [min(decoding.max_tokens, model.max_length - len(text.input_ids)) for text in texts]
    draws = _Draws(decoding, [text.seed for text in texts], longest, max(limits))
    ends = _Ends(model, decoding.stop, limits, longest)
    padded = [[model.pad_token_id] * (longest - len(text.input_ids)) + text.input_ids for text in texts]
    mask = [[0] * (longest - len(text.input_ids)) + [1] * len(text.input_ids) for text in texts]
    with torch.inference_mode():
        output = model.network.generate(
            input_ids=torch.tensor(padded, device=model.network.device),
            attention_mask=torch.tensor(mask, device=model.network.device),
            # greedy, for the processor leaves one token to choose from
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=max(limits), pad_token_id=model.pad_token_id
            ),
            logits_processor=LogitsProcessorList([draws]),
            stopping_criteria=StoppingCriteriaList([ends]),
        )
    return [
        _answer(model, decoding, text, tokens, ends.lengths[row], ends.reasons[row])
        for row, (text, tokens) in enumerate(zip(texts, output[:, longest:].tolist(), strict=True))
    ]


def _answer(
    model: PolicyNetwork, decoding: Decoding, text: Rendered, tokens: list[int], length: int, reason: str
) -> Answer:
    response = model.tokenizer.decode(tokens[:length], skip_special_tokens=True)
    stops = [response.find(stop) for stop in decoding.stop if stop in response]
    response = response[: min(stops)] if stops else response
    return Answer(
        prompt_id=text.prompt_id,
        response=response,
        status=status_of(response, reason),
        finish_reason=reason,
        prompt_tokens=len(text.input_ids),
        response_tokens=length,
    )


class _Draws(LogitsProcessor):  # type: ignore[misc]
    """Draws the next token of each row with that row's own random numbers, and leaves no other to choose."""

    def __init__(self, decoding: Decoding, seeds: Sequence[int | None], prompt_length: int, steps: int) -> None:
        self._decoding, self._prompt_length = decoding, prompt_length
        self._uniforms = torch.from_numpy(np.stack([np.random.default_rng(seed).random(steps) for seed in seeds]))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits with all but the drawn token at minus infinity."""
        if self._decoding.sampling_temperature == 0:
            return scores
        step = input_ids.shape[1] - self._prompt_length
        uniforms = self._uniforms[:, step].to(scores.device)
        drawn = draw_tokens(scores, uniforms, self._decoding.sampling_temperature, self._decoding.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw one token per row by inverting the distribution function.

    Args:
        logits: Rows × vocabulary.
        uniforms: One number in [0, 1) per row, float64.
        temperature: Above 0.
        top_p: The most probable tokens whose probabilities reach this sum are kept, at least one.
    """
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    reached = probabilities.cumsum(dim=-1)
    # below the whole, so that rounding cannot lead past the last token of any probability
    wanted = (uniforms[:, None] * reached[:, -1:]).clamp(max=torch.nextafter(reached[:, -1:], reached.new_zeros(())))
    places = torch.searchsorted(reached, wanted, right=True)
    return (places if order is None else order.gather(1, places))[:, 0]


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Ends each row at its end-of-text token, at a stop text or at its own limit, and remembers where and why."""

    def __init__(self, model: PolicyNetwork, stops: Sequence[str], limits: Sequence[int], prompt_length: int) -> None:
        self._model, self._stops, self._limits, self._prompt_length = model, stops, limits, prompt_length
        self._tail = _TAIL_TOKENS + max((len(stop) for stop in stops), default=0)
        self.lengths = [0] * len(limits)
        """Tokens of each response, its end-of-text token included."""
        self.reasons = [""] * len(limits)

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_: Any) -> Tensor:
        """Which rows have ended."""
        new = input_ids[:, self._prompt_length :]
        tails = new[:, -self._tail :].tolist()
        for row, reason in enumerate(self.reasons):
            if not reason:
                self.lengths[row] = new.shape[1]
                self.reasons[row] = self._reason(row, tails[row], new.shape[1])
        return torch.tensor([bool(reason) for reason in self.reasons], device=input_ids.device)

    def _reason(self, row: int, tail: list[int], length: int) -> str:
        if tail[-1] in self._model.end_token_ids:
            return "stop"
        if self._stops:
            text = self._model.tokenizer.decode(tail, skip_special_tokens=True)
            if any(stop in text for stop in self._stops):
                return "stop"
        return "length" if length >= self._limits[row] else ""
