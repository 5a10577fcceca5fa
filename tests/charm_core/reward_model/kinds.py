"""Tiny reward models of every kind, stored under the names that the published checkpoints use."""

import json
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.rendering import Rendered, render
from charm_core.reward_model.spec import RewardModelSpec
from tests.charm_core.reward_model.tiny import WORDS, messages, sentence

LLAMA = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
GEMMA = ("<end_of_turn>", "<start_of_turn>")
TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>", *LLAMA, *GEMMA, "user", "assistant", "model", "system", "\n", "\n\n")
VOCABULARY = {token: number for number, token in enumerate((*TOKENS, *WORDS))}
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {"llama": LLAMA_TEMPLATE, "qwen3": LLAMA_TEMPLATE, "gemma2": GEMMA_TEMPLATE}
WIDTH = 32


def tokenizer_of(architecture: str = "llama", **changes: Any) -> PreTrainedTokenizerFast:
    """A decoder's tokenizer without anything to complain of: padding has a token of its own, BOS comes from the template."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    breaks = pre_tokenizers.Split(Regex("\n+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([breaks, pre_tokenizers.Split(" ", "removed")])
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"} | changes
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side=settings.pop("padding_side", "right"),
        **{name: token for name, token in settings.items() if token is not None},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*LLAMA, *GEMMA]})
    tokenizer.chat_template = TEMPLATES[architecture]
    return tokenizer


def config_of(architecture: str, **changes: Any) -> Any:
    shape = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": VOCABULARY["<pad>"],
        "bos_token_id": VOCABULARY["<bos>"],
        "eos_token_id": VOCABULARY["<eos>"],
    }
    kinds = {"llama": LlamaConfig, "gemma2": Gemma2Config, "qwen3": Qwen3Config}
    return kinds[architecture](**(shape | changes))


def lively(model: Any, seed: int) -> Any:
    """Weights large enough for scores to differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def save(folder: Path, config: Any, weights: dict[str, Tensor], tokenizer: Any, **fields: Any) -> Path:
    """Write config.json, one safetensors file and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | fields, indent=1))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return folder


def body(architecture: str, seed: int) -> tuple[Any, dict[str, Tensor]]:
    """Config and weights of a decoder, named as under a head."""
    config = config_of(architecture)
    model = lively(AutoModel.from_config(config), seed)
    return config, {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}


def save_value_head(
    folder: Path, architecture: str = "llama", *, hidden: Sequence[int] = (24,), seed: int = 0, **fields: Any
) -> Path:
    """A GRM: hidden layers of the given widths in its head, none for a linear one."""
    config, weights = body(architecture, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    widths = [WIDTH, *hidden, 1]
    for number, (width, out) in enumerate(pairwise(widths)):
        name = f"v_head.summary.{2 * number}" if hidden else "v_head.summary"
        weights[f"{name}.weight"] = torch.randn((out, width), generator=generator) * 0.3
        weights[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.3
    # The language model's own head lies beside it, as in the published files.
    weights["lm_head.weight"] = torch.randn((len(VOCABULARY), WIDTH), generator=generator)
    return save(folder, config, weights, tokenizer_of(architecture), vhead_num_layers=len(hidden), **fields)


def save_gated(
    folder: Path,
    architecture: str = "llama",
    *,
    objectives: int = 5,
    quantiles: int = 1,
    layout: str = "armorm",
    temperature: float | None = 10.0,
    seed: int = 0,
    changes: dict[str, Tensor] | None = None,
) -> Path:
    """An ArmoRM (``armorm``), QRM-Llama (``qrm``) or QRM-Gemma-2 (``qrm-gemma``)."""
    config, weights = body(architecture, seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights["regression_layer.weight"] = random(objectives * quantiles, WIDTH) * 0.3
    if layout != "qrm-gemma":
        weights["reward_transform_matrix"] = torch.eye(objectives) + 0.3 * random(objectives, objectives)
    weights["gating.logit_scale"] = torch.tensor([1.7])
    number, width = 0, WIDTH
    for hidden in range(3):
        weights[f"gating.layers.{number}.weight"] = random(16, width) * 0.5
        if layout == "armorm":
            weights[f"gating.layers.{number}.bias"] = random(16) * 0.5
            number += 1
        else:
            norm = f"gating.layers.{number + 2}"
            weights |= {f"{norm}.weight": 1 + 0.2 * random(16), f"{norm}.bias": 0.2 * random(16)}
            weights |= {f"{norm}.running_mean": 0.3 * random(16), f"{norm}.running_var": 0.5 + random(16) ** 2}
            weights[f"{norm}.num_batches_tracked"] = torch.tensor(7)
            # QRM-Gemma-2 has a dropout, which stores nothing, after every batch norm but the last.
            number += 4 if layout == "qrm-gemma" and hidden < 2 else 3
        width = 16
    weights[f"gating.layers.{number}.weight"] = random(objectives, 16) * 3
    weights[f"gating.layers.{number}.bias"] = random(objectives)
    fields = {} if temperature is None else {"gating_temperature": temperature}
    weights |= changes or {}
    return save(folder, config, weights, tokenizer_of(architecture), num_objectives=objectives, **fields)


def save_causal(folder: Path, architecture: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A causal language model."""
    model = lively(AutoModelForCausalLM.from_config(config_of(architecture, **changes)), seed)
    model.save_pretrained(folder)
    tokenizer_of(architecture).save_pretrained(folder)
    return folder


def save_classifier(folder: Path, architecture: str = "llama", *, seed: int = 0, tokenizer: Any = None) -> Path:
    """A sequence classifier."""
    model = lively(AutoModelForSequenceClassification.from_config(config_of(architecture, num_labels=1)), seed)
    model.save_pretrained(folder)
    (tokenizer or tokenizer_of(architecture)).save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path, base: Path, *, seed: int = 0, task: str | None = "SEQ_CLS", tokenizer: Any = None
) -> Path:
    """A LoRA adapter of a sequence classifier, by PEFT itself; without a task it leaves the head alone."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(
        task_type=task, r=4, lora_alpha=12, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Any) -> None:
    """Edit the stored tensors of a folder's one safetensors file."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def change_json(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    stored = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in stored.items() if value is not None}))


def stored_body(folder: Path) -> Any:
    """The decoder in a folder, put together by hand."""
    weights = load_file(folder / "model.safetensors")
    model = AutoModel.from_config(
        config_of(json.loads((folder / "config.json").read_text())["model_type"]), attn_implementation="eager"
    )
    named = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    model.load_state_dict(named)
    return model.eval()


def last_hidden_states(model: Any, text: Rendered) -> Tensor:
    """Hidden states of one text alone, without padding: tokens × width."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([text.input_ids])).last_hidden_state[0]


def loaded(folder: Path, **settings: Any) -> Any:
    return load_reward_model(RewardModelSpec(path=str(folder), **settings))


def texts_of(model: Any, seed: int = 0, count: int = 9) -> list[Rendered]:
    """Random conversations of one and of three messages."""
    import numpy as np

    rng = np.random.default_rng(seed)
    prompts = [messages(*(sentence(rng, high=9) for _ in range(1 if number % 3 else 3))) for number in range(count)]
    return [render(model.tokenizer, prompt, sentence(rng, low=1, high=20), model.spec) for prompt in prompts]
