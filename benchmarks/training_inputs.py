"""What the training benchmark trains: reward models, and pairs of responses with the lengths of real ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    Qwen3Config,
)

from charm_core.reward_model.batching import PairGroup
from charm_core.reward_model.packing import prefix_groups
from charm_core.reward_model.plan import plan_steps, prepare
from charm_core.reward_model.pretrained import fit_to_model, load_config, load_tokenizer
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.stored.kinds import open_files
from charm_core.reward_model.tiny import word_tokenizer
from charm_core.tables import PAIRS, validate

RESPONSES = Path("data/responses.parquet")
SHORTER_RESPONSES = Path("data/rm_scores.parquet")
ENCODER = Path("models/minilm-judge-rm")
"""Below the folder with the shared data: 22 M parameters, BERT."""

PROMPT_LENGTHS, RESPONSE_LENGTHS = (3.44, 1.02), (5.84, 0.98)
"""Mean and standard deviation of the logarithm of the token counts in ``RESPONSES``."""
WORDS = [f"word{number}" for number in range(2000)]
TEMPLATE = "{% for message in messages %}[CLS] {{ message['role'] }}: {{ message['content'] }} [SEP]{% endfor %}"

Pair = dict[str, list[int]]
"""``chosen_ids``, ``rejected_ids`` and, for models with segments, ``chosen_types``, ``rejected_types``."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much arithmetic a model does for a token."""

    parameters: int
    """Without embeddings."""
    attention: float
    """Floating-point operations of a training step per token and token that it may look at."""
    looks_ahead: bool
    """Whether a token may look at those after it, so that texts that begin alike share nothing."""

    def operations(self, lengths: Sequence[int]) -> float:
        """Of a training step over texts of these lengths: forward and twice that backward, nothing recomputed."""
        counts = np.asarray(lengths, dtype=float)
        return 6.0 * self.parameters * float(counts.sum()) + self.attention * float((counts**2).sum())

    def per_token(self, lengths: Sequence[int]) -> float:
        """The same per token of the texts."""
        return self.operations(lengths) / sum(lengths)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of our training, as tokens."""

    pairs: list[Pair]
    """What the others are fed."""
    texts: list[int]
    """Tokens of every text; a response that is in several pairs is one."""
    repeated: list[int]
    """Of every text that shares its beginning with one before it, the tokens of that: packed rows do not compute them again."""


def real_responses(shared: Path) -> pl.DataFrame:
    """prompt_id, prompt, model, response."""
    frame = pl.read_parquet(shared / RESPONSES).filter(~pl.col("is_bad"))
    return frame.select("prompt_id", "prompt", "model", "response").sort("prompt_id", "model")


def shorter_responses(shared: Path) -> pl.DataFrame:
    """The same of small policy models, half as long; those that are empty are left out."""
    frame = pl.read_parquet(shared / SHORTER_RESPONSES).filter(pl.col("response").str.strip_chars() != "")
    frame = frame.select("prompt", "model", "response").unique(["prompt", "model"], keep="first", maintain_order=True)
    return frame.with_columns(prompt_id=pl.col("prompt").rank("dense").cast(pl.String)).sort("prompt_id", "model")


def made_up_responses(prompts: int, models: int, seed: int) -> pl.DataFrame:
    """The same in words without sense, as many as real texts have tokens."""
    rng = np.random.default_rng(seed)

    def text(lengths: tuple[float, float]) -> str:
        return " ".join(rng.choice(WORDS, size=max(1, round(rng.lognormal(*lengths)))))

    rows = []
    for number in range(prompts):
        prompt = text(PROMPT_LENGTHS)
        rows += [(f"prompt-{number:05d}", prompt, f"model-{m:02d}", text(RESPONSE_LENGTHS)) for m in range(models)]
    return pl.DataFrame(rows, schema=["prompt_id", "prompt", "model", "response"], orient="row")


def drawn_pairs(responses: pl.DataFrame, *, prompts: int, models: int, seed: int) -> pl.DataFrame:
    """PAIRS of ``models`` policy models per prompt, each with each; which of the two is chosen is drawn too.

    Args:
        responses: prompt_id, prompt, model, response; prompts with fewer policy models are passed over.
        prompts: How many prompts.
        models: How many policy models per prompt, drawn anew for each; 2: disjoint pairs.
        seed: Of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    by_prompt = responses.group_by("prompt_id", maintain_order=True).agg("model", "response", pl.col("prompt").first())
    enough = by_prompt.filter(pl.col("model").list.n_unique() >= models)
    if enough.height < prompts:
        raise SystemExit(f"{enough.height} prompts have {models} responses, {prompts} are asked for; take fewer steps")
    rows = []
    for prompt_id, names, texts, prompt in enough.sample(prompts, seed=seed, shuffle=True).iter_rows():
        for pair in combinations(rng.choice(len(names), size=models, replace=False), 2):
            chosen, rejected = rng.permutation(pair)
            rows.append(_pair(prompt_id, prompt, (names[chosen], texts[chosen]), (names[rejected], texts[rejected])))
    return validate(pl.DataFrame(rows, schema=dict(PAIRS.columns)), PAIRS)


def _pair(prompt_id: str, prompt: str, chosen: tuple[str, str], rejected: tuple[str, str]) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "split": "train",
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen[1]}],
        "rejected": [{"role": "assistant", "content": rejected[1]}],
        "chosen_model": chosen[0],
        "rejected_model": rejected[0],
        "chosen_score": 1.0,
        "rejected_score": 0.0,
        "chosen_calibrated": 1.0,
        "rejected_calibrated": 0.0,
        "margin": 1.0,
        "flipped": False,
    }


def build_model(name: str, folder: Path, shared: Path, *, layers: int | None, max_length: int) -> None:
    """Write a reward model.

    Args:
        name: ``encoder``: the MiniLM of the shared data (without it, random weights of its shape). ``decoder``: random weights of
            the Qwen3 type, as wide and deep. ``8b``: random weights in bfloat16 of the shape of Llama-3.1-8B.
        folder: Where.
        shared: The folder with the shared data.
        layers: How many, if not as many as it has.
        max_length: Most tokens of a text.
    """
    real = (shared / ENCODER).is_dir()
    tokenizer = AutoTokenizer.from_pretrained(shared / ENCODER) if real else word_tokenizer(WORDS, max_length)
    if name == "encoder" and real:
        kept = {} if layers is None else {"num_hidden_layers": layers}
        model = AutoModelForSequenceClassification.from_pretrained(shared / ENCODER, dtype=torch.float32, **kept)
    else:
        if real and name != "encoder":
            tokenizer.chat_template = TEMPLATE
            tokenizer.model_max_length = max_length
        torch.manual_seed(0)
        dtype = torch.bfloat16 if name == "8b" else torch.float32
        model = AutoModelForSequenceClassification.from_config(
            _config(name, tokenizer, layers=layers, max_length=max_length), dtype=dtype
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(name: str, tokenizer: Any, *, layers: int | None, max_length: int) -> Any:
    common = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": None}
    if name == "encoder":
        shape = {"hidden_size": 384, "num_hidden_layers": layers or 6, "num_attention_heads": 12}
        return BertConfig(vocab_size=30522, intermediate_size=1536, max_position_embeddings=512, **shape, **common)
    if name == "decoder":
        shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": layers or 6}
        heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
        # wider than the usual 0.02, so that even the first scores tell the texts apart
        return Qwen3Config(
            vocab_size=30522, initializer_range=0.1, max_position_embeddings=max_length, **shape, **heads, **common
        )
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": layers or 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaConfig(vocab_size=128256, max_position_embeddings=max_length, **shape, **heads, **common)


def work_of(folder: Path) -> Work:
    """From a model's config alone."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    tables = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding))
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # two products of queries, keys and values, two operations each, forward and twice backward; a decoder looks back only
    looks_ahead = config.model_type == "bert"
    attention = 12.0 * config.num_hidden_layers * width * (1.0 if looks_ahead else 0.5)
    parameters = sum(weights.numel() for weights in model.parameters()) - tables
    return Work(parameters=parameters, attention=attention, looks_ahead=looks_ahead)


def planned_steps(pairs: pl.DataFrame, spec: RewardModelSpec, config: TrainingConfig) -> list[Step]:
    """The steps that our training takes."""
    files = open_files(spec)
    tokenizer = load_tokenizer(files, spec)
    data = prepare(pairs, tokenizer, fit_to_model(spec, load_config(files.backbone, spec), tokenizer))

    def tokens(text: int, side: str) -> Iterator[tuple[str, list[int]]]:
        rendered = data.texts[text]
        yield f"{side}_ids", list(rendered.input_ids)
        if rendered.token_type_ids is not None:
            yield f"{side}_types", list(rendered.token_type_ids)

    def step(groups: Sequence[PairGroup]) -> Step:
        return Step(
            pairs=[
                dict([*tokens(group.texts[chosen], "chosen"), *tokens(group.texts[rejected], "rejected")])
                for group in groups
                for chosen, rejected in group.pairs
            ],
            texts=[data.lengths[text] for group in groups for text in group.texts],
            repeated=[
                shared for group in groups for shared in repeated([data.texts[text].input_ids for text in group.texts])
            ],
        )

    return [step(groups) for groups in plan_steps(data.train, config)]


def repeated(texts: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that packed rows do not compute again, for every text of a prompt that shares them with one before it."""
    groups = prefix_groups(texts, [0] * len(texts))  # as all of one prompt
    return [group.shared for group in groups if group.shared for _ in group.texts[1:]]


def pair_lengths(batch: Sequence[Pair]) -> list[int]:
    """Tokens of both texts of every pair."""
    return [len(pair[side]) for pair in batch for side in ("chosen_ids", "rejected_ids")]
