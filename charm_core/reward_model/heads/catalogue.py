"""Which kinds of reward model there are, and by what stored files each is told: never by a name. No torch.

A kind is loaded by ``load`` in the file of its name in this folder.

internlm2-reward has a head of its own (``v_head.weight``) on a backbone that transformers does not have: it runs only
with its own code, which CHARM does not load as a reward model. Serve it (remote scorer) or score it elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of reward model."""

    about: str
    """How the score comes about, in a few words for the help of the setting."""
    tensors: tuple[str, ...] = ()
    """It is told by stored tensors whose names begin so, by all of them; none: it is told otherwise."""
    one_row: str | None = None
    """Prefix of the tensors of its head, a matrix among which has one row: without, there is no single score."""
    body: Literal["language model", "sequence classifier", "causal language model"] = "language model"
    """As what transformers must know the model."""
    trainable: bool = False
    """Whether it can be fine-tuned: its network is a ``TrainableNetwork``."""
    needs_response_start: bool = False
    """Whether its network is told where the response begins, which takes a chat template."""


KINDS: Mapping[str, Kind] = {
    # What is none of the others: Skywork-Reward v0.2 and V2, FsfairX, RM-Mistral, BTRM-Qwen2, GRM ``*-ft``.
    "classifier": Kind(about="one logit", body="sequence classifier", trainable=True),
    # Ray2333/GRM ``*-sftreg``.
    "value_head": Kind(about="GRM", tensors=("v_head.summary.",), one_row="v_head.", trainable=True),
    # ArmoRM-Llama3-8B, QRM-Llama, QRM-Gemma-2.
    "gated": Kind(about="ArmoRM, QRM", tensors=("regression_layer.weight", "gating.")),
    # Any PEFT adapter that holds its head, told by ``adapter_config.json``; merged in, it is trained as a classifier.
    "lora": Kind(about="an adapter on base_model", body="sequence classifier", trainable=True),
    # Causal models trained with DPO, told by ``reference_model`` in the settings.
    "dpo": Kind(about="against reference_model", body="causal language model", needs_response_start=True),
}
"""By the name that settings and reports use."""
