"""Every rule: a fault that it must find, with a sentence that says what to do; and sound models on which all are silent."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors

from charm_core.errors import ModelError
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.memory import MemoryPlan, ModelShape
from charm_core.reward_model.preflight.facts import Machine
from charm_core.reward_model.preflight.room import advice
from charm_core.reward_model.preflight.run import preflight
from charm_core.reward_model.pretrained import load_tokenizer
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.stored.kinds import open_files
from tests.charm_core.reward_model.kinds import (
    GEMMA_TEMPLATE,
    LLAMA_TEMPLATE,
    VOCABULARY,
    change_json,
    change_weights,
    save_adapter,
    save_causal,
    save_classifier,
    save_gated,
    save_value_head,
    tokenizer_of,
)
from tests.charm_core.reward_model.tiny import messages, save_model, sentence

TRAINING = TrainingConfig()
BOS = VOCABULARY["<bos>"]


def texts(count=20, high=12):
    rng = np.random.default_rng(0)
    return [(messages(sentence(rng, high=high)), sentence(rng, high=high)) for _ in range(count)]


def look(folder, *given, training=None, in_all=None, **settings):
    return preflight(RewardModelSpec(path=str(folder), **settings), given, texts_in_all=in_all, training=training)


def only(report, rule, severity, *parts):
    """The one finding of a report, which must be of this rule and say this."""
    assert [(one.rule, one.severity) for one in report.findings] == [(rule, severity)], report
    for part in parts:
        assert part in report.findings[0].message
    assert report.errors == (report.findings if severity == "error" else ())
    if severity == "error":
        with pytest.raises(ModelError) as raised:
            report.raise_on_errors()
        assert str(raised.value) == report.findings[0].message
    else:
        report.raise_on_errors()
    return report.findings[0]


@pytest.fixture
def rm(tmp_path):
    return save_classifier(tmp_path / "rm")


# --- sound models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["llama", "gemma2", "qwen3", "bert", "deberta", "value_head", "gated", "qrm", "lora", "dpo"]
)
def test_on_a_sound_model_every_rule_is_silent(tmp_path, kind):
    settings = {}
    if kind in ("llama", "gemma2", "qwen3"):
        folder = save_classifier(tmp_path / "rm", kind)
    elif kind in ("bert", "deberta"):
        folder = save_model(tmp_path / "rm", kind)
    elif kind == "lora":
        folder = save_adapter(tmp_path / "rm", save_causal(tmp_path / "base"))
    elif kind == "dpo":
        folder = save_causal(tmp_path / "rm", seed=1)
        settings = {"reference_model": str(save_causal(tmp_path / "reference"))}
    elif kind == "value_head":
        folder = save_value_head(tmp_path / "rm")
    else:
        layout = (
            {"layout": "armorm"}
            if kind == "gated"
            else {"layout": "qrm-gemma", "architecture": "gemma2", "quantiles": 3}
        )
        folder = save_gated(tmp_path / "rm", **layout)
    training = TRAINING if kind not in ("gated", "qrm", "dpo") else None
    report = look(folder, *texts(), training=training, **settings)
    assert report.findings == ()
    assert (report.texts, report.texts_in_all) == (20, 20)
    load_reward_model(RewardModelSpec(path=str(folder), **settings))
    instructed = look(folder, *texts(), system_prompt="w1 w2", truncation_side="left", **settings)
    assert instructed.findings == ()


def test_the_hasty_tokenizer_is_the_one_that_scores(tmp_path):
    folders = [save_classifier(tmp_path / name, name) for name in ("llama", "gemma2", "qwen3")]
    folders += [save_model(tmp_path / name, name) for name in ("bert", "deberta")]
    # of this type transformers takes another class than the stored one
    shutil.copytree(folders[2], tmp_path / "qwen2")
    change_json(tmp_path / "qwen2" / "config.json", model_type="qwen2")
    for folder in (*folders, tmp_path / "qwen2"):
        spec = RewardModelSpec(path=str(folder))
        hasty, full = (load_tokenizer(open_files(spec), spec, in_haste=haste) for haste in (True, False))
        assert type(hasty) is type(full)
        assert hasty.backend_tokenizer.to_str() == full.backend_tokenizer.to_str()
        assert hasty.chat_template == full.chat_template
        assert hasty.special_tokens_map == full.special_tokens_map
        assert hasty.model_max_length == full.model_max_length


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path):
    only(look(tmp_path / "absent"), "files", "error", "is not a folder; give a Hugging Face model folder or a hub id")


def test_no_config(rm):
    (rm / "config.json").unlink()
    only(look(rm), "config", "error", "has no config.json")


def test_only_pickled_weights(rm):
    (rm / "model.safetensors").rename(rm / "pytorch_model.bin")
    only(
        look(rm), "weights", "error", "only ['pytorch_model.bin'], which is never unpickled; convert it to safetensors"
    )


def test_weights_that_were_not_downloaded_whole(rm):
    index = {"weight_map": {"score.weight": "model-00002-of-00002.safetensors"}}
    (rm / "model.safetensors.index.json").write_text(json.dumps(index))
    only(look(rm), "weights", "error", "lacks 1 of its weights files, first model-00002-of-00002.safetensors")


def test_damaged_weights(rm):
    (rm / "model.safetensors").write_bytes(b"nothing")
    only(look(rm), "files", "error", "use an intact copy")


@pytest.mark.parametrize("labels", [{"id2label": {"0": "a", "1": "b", "2": "c"}}, {"id2label": None, "num_labels": 3}])
def test_several_labels(rm, labels):
    change_json(rm / "config.json", **labels)
    only(look(rm), "labels", "error", "has 3 labels", "num_labels=1 in config.json")


def test_where_no_labels_are_stated_the_head_tells_them(rm):
    change_json(rm / "config.json", id2label=None, label2id=None)
    assert look(rm).findings == ()
    assert load_reward_model(RewardModelSpec(path=str(rm))).network.classifier.config.num_labels == 1
    change_weights(rm, lambda weights: weights.update({"score.weight": torch.zeros(2, 32)}))
    only(look(rm), "labels", "error", "has 2 labels")


def test_no_head(rm):
    change_weights(rm, lambda weights: weights.pop("score.weight"))
    only(look(rm), "head", "error", "has no head: none of score.weight, classifier.weight", "not a reward model")


def test_a_language_model_without_head(tmp_path):
    only(look(save_causal(tmp_path / "lm")), "head", "error", "set reward_model.reference_model")


def test_a_head_that_only_its_own_code_knows(rm):
    change_weights(rm, lambda weights: weights.update({"my_head.weight": weights.pop("score.weight")}))
    code = {"AutoModelForSequenceClassification": "modeling_mine.Mine"}
    change_json(rm / "config.json", auto_map=code)
    only(look(rm), "head", "error", "code of its own", "reward_model.trust_remote_code = true")
    assert look(rm, trust_remote_code=True).errors == ()


def test_a_value_head_with_several_outputs(tmp_path):
    folder = save_value_head(tmp_path / "rm", hidden=())
    change_weights(folder, lambda weights: weights.update({"v_head.summary.weight": torch.zeros(3, 32)}))
    only(look(folder), "head", "error", "none with one output")


def test_a_gate_that_does_not_fit_its_rewards(tmp_path):
    folder = save_gated(tmp_path / "rm", changes={"regression_layer.weight": torch.zeros(7, 32)})
    only(look(folder), "head", "error", "7 rewards but a gate of [5] weights")


def test_an_adapter_without_its_head(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"), task=None)
    only(look(adapter), "head", "error", "holds no head, nor does its base model", "modules_to_save=['score']")


def test_an_adapter_that_lost_its_head(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_classifier(tmp_path / "base"))
    change_weights(adapter, lambda weights: weights.pop("base_model.model.score.weight"))
    only(look(adapter), "head", "error", "lost when the adapter was saved", "Save it again with its head")


def test_an_adapter_whose_base_model_is_not_here(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    only(look(adapter), "files", "error", "is not on this machine: set reward_model.base_model")


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (None, ("transformers does not know the model type 'newest'", "use a version that does")),
        ({"AutoModelForSequenceClassification": "modeling_newest.Newest"}, (
            "read 'modeling_newest.Newest' there, then set reward_model.trust_remote_code = true",
        )),
        ({"AutoModel": "modeling_newest.ForReward"}, ("which is not what CHARM scores with", "serve it")),
    ],
)  # fmt: skip
def test_a_model_that_needs_code_of_its_own(rm, code, parts):
    change_json(rm / "config.json", model_type="newest", auto_map=code)
    only(look(rm), "remote-code", "error", *parts)


def test_code_that_is_trusted_is_no_finding(rm):
    change_json(rm / "config.json", model_type="newest", auto_map={"AutoModelForSequenceClassification": "m.Newest"})
    assert "remote-code" not in [one.rule for one in look(rm, trust_remote_code=True).findings]


def test_internlm2_reward_is_refused_with_a_way_out(rm):
    change_weights(rm, lambda weights: weights.update({"v_head.weight": weights.pop("score.weight")}))
    change_json(
        rm / "config.json", model_type="internlm2", auto_map={"AutoModel": "modeling_internlm2.InternLM2ForRewardModel"}
    )
    report = look(rm)
    assert report.errors[0].rule == "remote-code"
    assert "serve it and score through its server" in report.errors[0].message


def test_a_reference_of_another_vocabulary(tmp_path):
    policy = save_causal(tmp_path / "policy", seed=1)
    other = save_causal(tmp_path / "other", vocab_size=len(VOCABULARY) + 8)
    report = look(policy, reference_model=str(other))
    only(report, "reference", "error", f"vocabulary of {len(VOCABULARY)} tokens and its reference")


def test_a_model_that_is_its_own_reference(tmp_path):
    policy = save_causal(tmp_path / "policy")
    only(look(policy, reference_model=str(policy)), "reference", "error", "all scores would be 0")


# --- special tokens and padding ---------------------------------------------------------------------------------------


def test_no_pad_token(tmp_path):
    rm = save_classifier(tmp_path / "rm", tokenizer=tokenizer_of(pad_token=None))
    only(look(rm), "pad-token", "info", "has no pad token", "no score changes")


def test_the_pad_token_is_the_end_of_text_token(tmp_path):
    rm = save_classifier(tmp_path / "rm", tokenizer=tokenizer_of(pad_token="<eos>"))
    only(look(rm), "pad-token", "info", "'<eos>' is the end-of-text token", "no score changes")


def test_neither_pad_nor_end_of_text_token(tmp_path):
    rm = save_classifier(tmp_path / "rm", tokenizer=tokenizer_of(pad_token=None, eos_token=None))
    only(look(rm), "pad-token", "error", "set pad_token in its tokenizer_config.json")


def test_a_pad_token_that_was_added_without_a_row_in_the_embedding(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rm = save_classifier(tmp_path / "rm", tokenizer=tokenizer)
    finding = only(look(rm), "embedding-rows", "error", f"has {len(VOCABULARY)} rows", "'[PAD]'", "Set pad_token")
    assert f"id {len(VOCABULARY)}, which pads" in finding.message


def test_another_added_token_without_a_row(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["<extra>"])
    only(look(save_classifier(tmp_path / "rm", tokenizer=tokenizer)), "embedding-rows", "warning", "'<extra>'")


def test_padding_on_the_left(tmp_path):
    rm = save_classifier(tmp_path / "rm", tokenizer=tokenizer_of(padding_side="left"))
    only(look(rm), "padding-side", "info", "pads on the left", "no score changes", "padding_side='right'")


def test_a_template_that_writes_bos_twice(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = "{{ bos_token }}" + LLAMA_TEMPLATE
    rm = save_classifier(tmp_path / "rm", tokenizer=tokenizer)
    only(look(rm), "bos-doubled", "warning", "writes the token '<bos>' twice", "reward_model.chat_template")


def adds_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def test_bos_from_the_template_and_from_the_tokenizer(tmp_path):
    rm = save_classifier(tmp_path / "rm", tokenizer=adds_bos(tokenizer_of()))
    only(
        look(rm),
        "bos-doubled",
        "info",
        "both the chat template and the tokenizer write '<bos>'",
        "texts begin with one",
    )


def test_a_template_that_lacks_the_bos_of_plain_text(tmp_path):
    tokenizer = adds_bos(tokenizer_of())
    tokenizer.chat_template = LLAMA_TEMPLATE.removeprefix("{{ bos_token }}")
    rm = save_classifier(tmp_path / "rm", tokenizer=tokenizer)
    only(look(rm), "bos-missing", "warning", "begins plain text with '<bos>'", "begins with {{ bos_token }}")
    assert look(rm, chat_template="{{ bos_token }}" + tokenizer.chat_template).warnings[0].rule == "template-override"


def test_a_tokenizer_that_transformers_reads_otherwise_than_it_is_stored(tmp_path):
    rm = save_classifier(tmp_path / "rm", "qwen3")
    change_json(rm / "config.json", model_type="qwen2")
    finding = next(one for one in look(rm).findings if one.rule == "tokenizer")
    assert finding.severity == "warning"
    assert "as a Qwen2Tokenizer, which splits text otherwise than the tokenizer.json" in finding.message


# --- chat template ----------------------------------------------------------------------------------------------------


def test_neither_template_nor_separators(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = None
    rm = save_classifier(tmp_path / "rm", tokenizer=tokenizer)
    only(look(rm, *texts()), "template", "error", "neither a chat template nor separator tokens")


def test_a_template_that_refuses_the_system_prompt(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + LLAMA_TEMPLATE
    )
    rm = save_classifier(tmp_path / "rm", tokenizer=tokenizer)
    assert look(rm).findings == ()
    only(
        look(rm, system_prompt="w1"),
        "template",
        "error",
        "System role not supported",
        "leave reward_model.system_prompt out",
    )
    prompt = [{"role": "system", "content": "w1"}, *messages("w2")]
    only(
        look(rm, *texts(), (prompt, "w3")),
        "texts",
        "error",
        "roles ['system', 'user', 'assistant']",
        "Leave such prompts out",
    )


def test_a_template_that_writes_todays_date(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = "{{ bos_token }}{{ strftime_now('w%d') }} " + LLAMA_TEMPLATE.removeprefix(
        "{{ bos_token }}"
    )
    rm = save_classifier(tmp_path / "rm", tokenizer=tokenizer)
    only(look(rm), "template-date", "info", "writes the day's date", "CHARM writes 26 July 2024 on every day")


def test_a_clock_that_conversations_never_reach_is_no_finding(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = LLAMA_TEMPLATE + "{% if tools %}{{ strftime_now('w%d') }}{% endif %}"
    assert look(save_classifier(tmp_path / "rm", tokenizer=tokenizer)).findings == ()


def test_two_templates_that_differ(rm):
    change_json(rm / "tokenizer_config.json", chat_template=LLAMA_TEMPLATE)
    assert look(rm).findings == ()
    change_json(rm / "tokenizer_config.json", chat_template=GEMMA_TEMPLATE)
    only(
        look(rm),
        "two-templates",
        "warning",
        "in chat_template.jinja and tokenizer_config.json",
        "The one in chat_template.jinja is used",
    )
    spec = RewardModelSpec(path=str(rm))
    assert load_tokenizer(open_files(spec), spec).chat_template == LLAMA_TEMPLATE
    named = [{"name": "default", "template": GEMMA_TEMPLATE}, {"name": "tool_use", "template": LLAMA_TEMPLATE}]
    change_json(rm / "tokenizer_config.json", chat_template=named)
    assert [one.rule for one in look(rm).findings] == ["two-templates"]


def test_an_override_that_replaces_the_models_own_template(rm):
    only(look(rm, chat_template=GEMMA_TEMPLATE), "template-override", "warning", "texts become other tokens")
    assert look(rm, chat_template=LLAMA_TEMPLATE + "\n").findings == ()
    assert look(rm, chat_template="{# the same #}" + LLAMA_TEMPLATE).findings == ()
    (rm / "chat_template.jinja").unlink()
    assert look(rm, chat_template=GEMMA_TEMPLATE).findings == ()


def test_an_override_that_is_not_there(rm):
    only(look(rm, chat_template="absent.jinja"), "tokenizer", "error", "neither Jinja text")


def test_an_adapter_with_another_template_than_its_base(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = GEMMA_TEMPLATE
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"), tokenizer=tokenizer)
    only(look(adapter), "adapter-template", "warning", "The adapter's is used", "reward_model.chat_template")
    same = save_adapter(tmp_path / "same", tmp_path / "base", tokenizer=tokenizer_of())
    assert look(same).findings == ()


@pytest.mark.parametrize(
    ("trained", "settings", "part"),
    [
        (
            {"system_prompt": "w1"},
            {},
            "fine-tuned with system_prompt='w1', but is to be scored with system_prompt=None",
        ),
        (
            {"system_prompt": "w1"},
            {"system_prompt": "w2"},
            "set reward_model.system_prompt to what it was trained with",
        ),
        ({"truncation_side": "left"}, {}, "truncation_side='left', but is to be scored with truncation_side='right'"),
    ],
)
def test_a_model_that_is_scored_otherwise_than_it_was_trained(rm, trained, settings, part):
    (rm / "charm_rendering.json").write_text(json.dumps(trained))
    only(look(rm, **settings), "rendering", "warning", part)
    assert look(rm, **trained).findings == ()


def test_a_gate_that_finds_no_place_to_read(tmp_path):
    rm = save_gated(tmp_path / "rm")
    template = LLAMA_TEMPLATE.replace("m['role'] + '<|end_header_id|>", "'model' + '<|end_header_id|>")
    report = look(rm, chat_template=template)
    assert [(one.rule, one.severity) for one in report.findings] == [
        ("gate", "error"),
        ("template-override", "warning"),
    ]
    assert "give the template that the model was trained with" in report.errors[0].message
    only(look(save_gated(tmp_path / "qwen", "qwen3")), "gate", "error", "gating_token_pattern")


def test_a_dpo_template_whose_prompt_is_no_beginning_of_the_text(tmp_path):
    policy, reference = save_causal(tmp_path / "policy", seed=1), save_causal(tmp_path / "reference")
    template = LLAMA_TEMPLATE.replace(
        "prompt %}{{ '<|start_header_id|>assistant", "prompt %}{{ 'w9 <|start_header_id|>assistant"
    )
    for folder in (policy, reference):
        (folder / "chat_template.jinja").write_text(template)
    report = look(policy, reference_model=str(reference))
    only(report, "response-start", "warning", "All tokens from the first difference on count as the response's")


def test_a_dpo_model_without_chat_template(tmp_path):
    policy, reference = save_causal(tmp_path / "policy", seed=1), save_causal(tmp_path / "reference")
    tokenizer = tokenizer_of(cls_token="<bos>", sep_token="<eos>")
    tokenizer.chat_template = None
    shutil.rmtree(policy / "chat_template.jinja", ignore_errors=True)
    (policy / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(policy)
    report = look(policy, reference_model=str(reference))
    only(report, "response-start", "error", "which tokens are the response's is unknown")


# --- numbers ----------------------------------------------------------------------------------------------------------


def stored_as(folder: Path, dtype):
    change_weights(folder, lambda weights: weights.update({name: tensor.to(dtype) for name, tensor in weights.items()}))


def test_weights_that_float16_could_not_hold(rm):
    change_weights(rm, lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3, 4].fill_(1e5))
    stored_as(rm, torch.float16)
    only(
        look(rm), "finite-weights", "error", "first in model.layers.1.mlp.up_proj.weight", "float16, which ends at 65504",
        "Take the original in bfloat16 or float32",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_numbers(rm, dtype):
    change_weights(rm, lambda weights: weights["score.weight"][0, 1].fill_(float("nan")))
    stored_as(rm, dtype)
    only(look(rm), "finite-weights", "error", "first in score.weight; use an intact copy")


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "F32"), (torch.bfloat16, "BF16")])
def test_float16_for_weights_of_a_wider_range(rm, dtype, name):
    stored_as(rm, dtype)
    only(look(rm, dtype="float16"), "float16", "warning", f"stored in {name}", "Set it to 'bfloat16'")
    assert look(rm, dtype="bfloat16").findings == ()
    stored_as(rm, torch.float16)
    assert look(rm, dtype="float16").findings == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float16_for_weights_that_it_cannot_hold(rm, dtype):
    change_weights(rm, lambda weights: weights["model.norm.weight"][0].fill_(70000.0))
    stored_as(rm, dtype)
    only(
        look(rm, dtype="float16"),
        "float16",
        "error",
        "model.norm.weight",
        "values beyond 65504",
        "'bfloat16' or 'float32'",
    )


def test_an_attention_kernel_that_is_not_installed(rm):
    only(look(rm, attention="flash_attention_2"), "attention", "error", "flash_attn is not installed here")


def test_an_attention_kernel_that_cannot_cap_scores(tmp_path):
    rm = save_classifier(tmp_path / "rm", "gemma2")
    only(look(rm, attention="sdpa"), "attention", "error", "attn_logit_softcapping", "'auto' or 'eager'")
    assert look(rm, attention="eager").findings == ()


# --- what is to be done -----------------------------------------------------------------------------------------------


def test_texts_over_the_limit(rm):
    given = [*texts(18), (messages("w1"), "w2 " * 50), (messages("w1"), "w2 " * 60)]
    report = look(rm, *given, max_length=40)
    only(
        report, "length", "warning", "2 of 20 texts are longer than 40 tokens, the longest 72", "their responses lose their end",
        "fewer than 64 tokens of the response", "raise reward_model.max_length (the model takes 128)",
    )  # fmt: skip
    sampled = look(rm, *given, max_length=40, in_all=14000).findings[0].message
    assert sampled.startswith("2 of 20 sampled texts (of 14,000; about 10% of all) are longer")
    left = look(rm, *given, max_length=40, truncation_side="left").findings[0].message
    assert "their prompts lose their beginning" in left
    assert look(rm, *given, max_length=72).findings == ()


def test_texts_over_the_models_own_limit(rm):
    report = look(rm, (messages("w1 " * 200), "w2"))
    only(
        report,
        "length",
        "warning",
        "longer than 128 tokens",
        "the model takes no more",
        "reward_model.max_prompt_characters",
    )
    assert look(rm, (messages("w1 " * 200), "w2"), max_prompt_characters=60).findings == ()


def test_a_kind_that_cannot_be_fine_tuned(tmp_path):
    gated = save_gated(tmp_path / "gated")
    assert look(gated).findings == ()
    only(look(gated, training=TRAINING), "training", "error", "kind 'gated'", "cannot fine-tune", "or audit this one")
    policy, reference = save_causal(tmp_path / "policy", seed=1), save_causal(tmp_path / "reference")
    only(look(policy, training=TRAINING, reference_model=str(reference)), "training", "error", "kind 'dpo'")


def test_more_layers_than_there_are(rm):
    report = look(rm, training=TrainingConfig(trainable_layers=3))
    only(report, "training", "error", "training.trainable_layers is 3", "has 2 layers: set it to at most that")
    assert look(rm, training=TrainingConfig(trainable_layers=2)).findings == ()


def test_the_worst_comes_first_and_errors_are_raised_together(tmp_path):
    rm = save_classifier(tmp_path / "rm", tokenizer=tokenizer_of(pad_token="<eos>"))
    training = TrainingConfig(trainable_layers=9)
    text = (messages("w1"), "w2 " * 60)
    report = look(rm, text, max_length=40, attention="flash_attention_2", training=training)
    assert [one.severity for one in report.findings] == ["error", "error", "warning", "info"]
    with pytest.raises(ModelError, match=r"(?s)flash_attn is not installed.*has 2 layers"):
        report.raise_on_errors()
    assert [one.rule for one in report.warnings] == ["length"]


# --- memory -----------------------------------------------------------------------------------------------------------


def a_machine(gigabytes, gpus=0, **changes):
    size = int(gigabytes * 1e9)
    settings = {"gpus": gpus, "gpu_bytes": size if gpus else 0, "memory_bytes": size, "cores": 2}
    return Machine(**(settings | changes))


def look_at_training(folder, machine, **settings):
    return preflight(RewardModelSpec(path=str(folder)), training=TrainingConfig(**settings), machine=machine)


def test_a_training_that_fits_says_what_it_needs(rm):
    found = only(look_at_training(rm, a_machine(80, gpus=8)), "memory", "info", "each of 8 GPUs", "that fits")
    assert "a GPU here has 80 GB" in found.message
    only(
        look_at_training(rm, a_machine(24), zero_stage=None), "memory", "info", "one process", "this machine has 24 GB"
    )
    only(look_at_training(rm, a_machine(24, machines=3)), "memory", "info", "each of 6 processes")


def test_a_training_that_cannot_fit_is_an_error(tmp_path):
    # 9.6 million parameters: 154 MB of weights, gradients and moments in one process, 38 MB to load
    folder = save_model(tmp_path / "rm", vocab_size=300_000)
    for gigabytes, severity, said in ((0.15, "error", "that cannot fit"), (2, "info", "that fits")):
        report = look_at_training(folder, a_machine(gigabytes, gpus=1), zero_stage=None, micro_batch_tokens=100)
        (found,) = [one for one in report.findings if one.rule == "memory"]
        assert (found.severity, said in found.message) == (severity, True)


def test_where_only_the_activations_are_too_much_it_is_a_warning(rm):
    report = look_at_training(rm, a_machine(80, gpus=1), zero_stage=None, micro_batch_tokens=50_000_000)
    found = only(report, "memory", "warning", "that may not fit", "activations")
    tokens = int(re.search(r"training.micro_batch_tokens of at most ([\d,]+)$", found.message)[1].replace(",", ""))
    assert 10_000_000 < tokens < 50_000_000
    only(
        look_at_training(rm, a_machine(80, gpus=1), zero_stage=None, micro_batch_tokens=tokens),
        "memory",
        "info",
        "fits",
    )


def test_what_would_fit_is_told_by_gpus_and_settings():
    # Llama-3.1-8B, whose state alone is 120 GB without ZeRO
    layer = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
    shape = ModelShape(
        parameters=7_504_928_768,
        layers=(218_112_000,) * 32,
        linear=(layer,) * 32,
        head=4096,
        width=4096,
        inner_width=14336,
        gated=True,
    )
    plan = MemoryPlan(zero_stage=None, ranks=1, bfloat16=True, micro_batch_tokens=8192)
    told = advice(shape, plan, a_machine(80, gpus=8))
    assert told.startswith("What would do: 4 x 80 GB with training.zero_stage = 3 and training.gradient_checkpointing")
    small = advice(shape, plan, a_machine(24, gpus=8))
    assert small.startswith("No number of such GPUs is enough: every rank first loads the whole model, 30 GB")


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size"])
def test_a_model_whose_width_is_not_told_is_not_judged_and_that_is_said(rm, name):
    change_json(rm / "config.json", **{name: None})
    said = f"the memory of a fine-tuning cannot be estimated: config.json has no {name}"
    assert only(look_at_training(rm, a_machine(80, gpus=8)), "memory", "info").message == said


def test_a_model_whose_tensors_name_no_layer_is_not_judged_and_that_is_said(rm):
    weights = load_file(rm / "model.safetensors")
    unnamed = {re.sub(r"\.(\d+)\.", r".layer\1.", name): tensor for name, tensor in weights.items()}
    save_file(unnamed, rm / "model.safetensors")
    (found,) = [one for one in look_at_training(rm, a_machine(80, gpus=8)).findings if one.rule == "memory"]
    assert (found.severity, found.message.endswith("do not tell which layer they are of")) == ("info", True)


def test_where_the_machine_is_unknown_memory_is_not_judged(rm):
    assert look_at_training(rm, None).findings == ()
