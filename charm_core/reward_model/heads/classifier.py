"""Sequence classifiers with one label, decoders and encoders.

Skywork-Reward v0.2 and V2 (Llama, Gemma 2, Qwen 3), FsfairX-LLaMA3-RM, RM-Mistral-7B, BTRM-Qwen2, Ray2333's GRM ``*-ft``
and encoders such as OpenAssistant's DeBERTa are stored so: a ``score`` or ``classifier`` layer beside the backbone.
"""

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from charm_core.errors import ModelError
from charm_core.reward_model.attention import Layout
from charm_core.reward_model.heads.backbone import attention_of, check_nothing_is_made_up
from charm_core.reward_model.network import Float32Head, TrainableNetwork, at_places
from charm_core.reward_model.rendering import Rendered
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.checks import states_labels
from charm_core.reward_model.stored.files import StoredModel
from charm_core.reward_model.stored.kinds import HEAD_NAMES, ModelFiles


class ClassifierNetwork(TrainableNetwork):
    """Wraps a Hugging Face sequence classifier with one label.

    A decoder's classifier (one with a ``score`` layer) reads the hidden state of the last real token, found by its position
    and not by looking for padding ids, so that a pad token that equals the end-of-text token does no harm. Any other
    classifier uses its own head.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.head_name = head_name(classifier)
        replace_head(classifier, self.head_name)
        self.reads_last_token = self.head_name == "score"
        self.looks_ahead = not self.reads_last_token
        self.takes_token_types = "token_type_ids" in inspect.signature(classifier.forward).parameters

    @property
    def transformer(self) -> Any:
        """The classifier itself."""
        return self.classifier

    @property
    def packable(self) -> Any:
        """The transformer of a decoder, or of an encoder whose score is read as BERT's is."""
        body = self._body()
        pooler = getattr(body, "pooler", None)
        as_bert = self.head_name == "classifier" and pooler is not None and not isinstance(pooler, nn.Linear)
        return body if self.reads_last_token or as_bert else None

    def places(self, text: Rendered) -> tuple[int, ...]:
        """The last token of a decoder's text, the first of an encoder's."""
        return (len(text.input_ids) - 1 if self.reads_last_token else 0,)

    def forward(
        self,
        input_ids: Tensor,
        places: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        response_starts: Tensor | None = None,  # noqa: ARG002 - no matter for a classifier
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Score a batch; see ``RewardNetwork.forward``."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_token_types and token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if layout is not None:
            inputs |= {"position_ids": position_ids, "layout": layout}
        classifier = cast(Any, self.classifier)
        with self.lower_precision(input_ids.device):
            if self.reads_last_token:
                hidden = self._body()(**inputs, use_cache=False).last_hidden_state
                return cast(Tensor, classifier.score(at_places(hidden, places, layout)[:, 0])[:, 0])
            if layout is None:
                return cast(Tensor, classifier(**inputs).logits[:, 0].float())
            hidden = self._body()(**inputs).last_hidden_state
            pooled = self._body().pooler(at_places(hidden, places, layout))
            return cast(Tensor, classifier.classifier(pooled)[:, 0])

    def _body(self) -> Any:
        return getattr(self.classifier, cast(Any, self.classifier).base_model_prefix, None)

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder."""
        cast(Any, self.classifier).save_pretrained(folder)


def load(
    files: ModelFiles,
    spec: RewardModelSpec,
    dtype: torch.dtype,
    tokenizer: Any,  # noqa: ARG001 - of no use here
) -> ClassifierNetwork:
    """Load a classifier.

    Raises:
        ModelError: Weights cannot be read or are missing, or there is no scalar head.
    """
    # Left unstated, transformers would take it for two.
    labels = {} if states_labels(files.model) else {"num_labels": 1}
    classifier, report = load_classifier(files.model, spec, dtype, **labels)
    check_nothing_is_made_up(report, files.model)
    return ClassifierNetwork(classifier)


def load_classifier(
    model: StoredModel, spec: RewardModelSpec, dtype: torch.dtype, **changes: Any
) -> tuple[Any, dict[str, Any]]:
    """A transformers classifier, and transformers' report on its weights.

    Args:
        model: Where it is stored.
        spec: How to load it.
        dtype: Type of the weights.
        changes: Fields of its config that shall be others than stored.

    Raises:
        ModelError: The weights cannot be read.
    """
    try:
        classifier, report = AutoModelForSequenceClassification.from_pretrained(
            str(model.folder),
            dtype=dtype,
            attn_implementation=attention_of(spec),
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **changes,
        )
    except Exception as error:
        raise ModelError(f"the weights of the reward model {model.name!r} cannot be loaded: {error}") from error
    return classifier, report


def head_name(classifier: nn.Module) -> str:
    """The dotted name of the linear layer with one output that gives the score.

    Raises:
        ModelError: No such layer where Hugging Face classifiers have it.
    """
    for name in HEAD_NAMES:
        try:
            layer = classifier.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear) and layer.out_features == 1:
            return name
    raise ModelError(
        f"{type(classifier).__name__} has no scalar head: none of {', '.join(HEAD_NAMES)} is a linear layer with one output; "
        "CHARM scores with sequence classifiers that have one label"
    )


def replace_head(model: nn.Module, name: str) -> None:
    """Let a linear layer compute in float32, keeping its parameters."""
    old = cast(nn.Linear, model.get_submodule(name))
    head = Float32Head(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    head.weight, head.bias = old.weight, old.bias
    model.set_submodule(name, head)
