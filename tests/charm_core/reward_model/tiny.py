"""Tiny reward models of real architectures, made in code, and tables to go with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from charm_core.reward_model.rendering import Rendered, render

WORDS = tuple(f"w{number}" for number in range(40))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<bos>", "<eos>", "<user>", "<assistant>", "<system>")
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<' + m['role'] + '>' }} {{ m['content'] }} {{ '<eos>' }}{% endfor %}"
)
ARCHITECTURES = ("qwen3", "llama", "mistral", "gemma2", "gemma3", "bert", "deberta")
DECODERS = ("qwen3", "llama", "mistral", "gemma2", "gemma3")
# far less than a text is long, so that it matters
WINDOW = 7
VOCABULARY = {token: number for number, token in enumerate((*SPECIAL, *WORDS))}


def backend() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def chat_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """A decoder's tokenizer, which adds a BOS of its own to plain text, as Llama's does."""
    made = backend()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", VOCABULARY["<bos>"])]
    )
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "[UNK]"} | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **settings)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<system>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pair_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """An encoder's tokenizer: [CLS] prompt [SEP] response [SEP]."""
    made = backend()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", VOCABULARY["[CLS]"]), ("[SEP]", VOCABULARY["[SEP]"])],
    )
    settings = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"} | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **settings
    )


def config_of(architecture: str, **changes: Any) -> Any:
    shape = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "num_labels": 1,
        "pad_token_id": VOCABULARY["[PAD]"],
    } | changes
    decoder = {"num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.3, "pad_token_id": VOCABULARY["<eos>"]}
    if architecture == "qwen3":
        return Qwen3Config(**(shape | decoder | changes))
    if architecture == "llama":
        return LlamaConfig(**(shape | decoder | changes))
    if architecture == "mistral":
        return MistralConfig(**(shape | decoder | {"sliding_window": WINDOW} | changes))
    if architecture == "gemma2":
        small = {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
        return Gemma2Config(**(shape | decoder | small | changes))
    if architecture == "gemma3":
        small = {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2}
        return Gemma3TextConfig(**(shape | decoder | small | changes))
    if architecture == "bert":
        return BertConfig(**shape)
    return DebertaV2Config(**shape, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0)


def save_model(
    folder: Path, architecture: str = "qwen3", *, seed: int = 0, tokenizer: Any = None, **changes: Any
) -> Path:
    """A random reward model in a folder; scores spread over about a unit."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config_of(architecture, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
            if name.startswith(("score", "classifier")):
                parameter.mul_(4)
    model.save_pretrained(folder)
    if tokenizer is None:
        tokenizer = pair_tokenizer() if architecture in ("bert", "deberta") else chat_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder


def sentence(rng: np.random.Generator, low: int = 1, high: int = 12) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(low, high)))


def messages(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def some_texts(model: Any, seed: int, prompts: int = 4, responses: int = 5) -> tuple[list[Rendered], list[int]]:
    """Responses to a few prompts: long, empty and equal ones among them."""
    rng = np.random.default_rng(seed)
    texts, owners = [], []
    for owner in range(prompts):
        prompt = messages(sentence(rng, 1, 30))
        answers = ["", *(sentence(rng, 1, 40) for _ in range(responses - 1))]
        answers[-1] = answers[-2] if seed % 2 else answers[-1]
        texts.extend(render(model.tokenizer, prompt, answer, model.spec) for answer in answers)
        owners.extend([owner] * responses)
    return texts, owners


def prompts_and_responses(
    prompts: int, models: Sequence[str] = ("a", "b", "c"), seed: int = 0
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """PROMPTS and RESPONSES of random words."""
    rng = np.random.default_rng(seed)
    ids = [f"p{number:03d}" for number in range(prompts)]
    asked = pl.DataFrame({"prompt_id": ids, "prompt_set": "tiny", "messages": [messages(sentence(rng)) for _ in ids]})
    rows = [(prompt, model, sentence(rng)) for prompt in ids for model in models]
    return asked, pl.DataFrame(rows, schema=["prompt_id", "policy_model", "response"], orient="row")


def pairs_table(
    prompts: int = 12, models: Sequence[str] = ("a", "b", "c"), held_out: int = 3, seed: int = 0
) -> pl.DataFrame:
    """PAIRS: all pairs of a few models, whose calibrated score counts the words ``w0`` to ``w9``."""
    asked, responses = prompts_and_responses(prompts, models, seed)
    prompt_of = dict(zip(asked["prompt_id"], asked["messages"].to_list(), strict=True))
    rows = []
    for number, prompt_id in enumerate(asked["prompt_id"]):
        answers = responses.filter(pl.col("prompt_id") == prompt_id).select("policy_model", "response").rows()
        scored = sorted((_quality(text) + 0.01 * index, model, text) for index, (model, text) in enumerate(answers))
        for low, worse in enumerate(scored):
            for better in scored[low + 1 :]:
                rows.append(
                    _pair_row(
                        prompt_id, "held_out" if number < held_out else "train", prompt_of[prompt_id], better, worse
                    )
                )
    return pl.DataFrame(rows)


def _quality(text: str) -> float:
    return sum(len(word) == 2 for word in text.split()) / 4


def _pair_row(prompt_id: str, split: str, prompt: list[dict[str, str]], better: Any, worse: Any) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "split": split,
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": better[2]}],
        "rejected": [{"role": "assistant", "content": worse[2]}],
        "chosen_model": better[1],
        "rejected_model": worse[1],
        "chosen_score": better[0],
        "rejected_score": worse[0],
        "chosen_calibrated": better[0],
        "rejected_calibrated": worse[0],
        "margin": better[0] - worse[0],
        "flipped": False,
    }


def held_out_margin(folder: Path, job: Any) -> float:
    """Mean score of chosen minus rejected over a training job's held-out pairs, by scoring with the model in a folder."""
    from charm_core.reward_model.loading import load_reward_model
    from charm_core.reward_model.plan import prepare
    from charm_core.reward_model.text_scoring import score_texts

    model = load_reward_model(job.model.saved_at(str(folder)))
    data = prepare(pl.read_parquet(job.pairs_path), model.tokenizer, model.spec)
    scores = score_texts(model, list(data.texts))
    margins = [scores[group.texts[c]] - scores[group.texts[r]] for group in data.held_out for c, r in group.pairs]
    return float(sum(margins) / len(margins))
