"""The reward that a model trained with DPO implies: β · (log p_policy(response) − log p_reference(response)).

As TRL and RewardBench compute it: natural logarithms, summed (not averaged) over the response's tokens given the prompt. The
response's tokens are all that follow the prompt with the header of the answer, so the token that ends the turn is one of
them; the prompt, BOS and header are not. A long response sums over more tokens, so its score is larger in size. Published
models of this kind are ordinary causal models, such as the Zephyr, Tulu 2 DPO and Starling families; the reference is the
model that DPO training began with. Needs a chat template.
"""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from charm_core.errors import ModelError
from charm_core.reward_model.attention import Layout
from charm_core.reward_model.heads.backbone import attention_of, check_nothing_is_made_up
from charm_core.reward_model.heads.classifier import replace_head
from charm_core.reward_model.network import RewardNetwork
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.files import StoredModel
from charm_core.reward_model.stored.kinds import ModelFiles

MOST_LOGITS = 2**28
"""Logits held at once, 1 GiB in float32: a batch whose responses need more goes through in parts."""


class ImplicitRewardNetwork(RewardNetwork):
    """Policy and reference side by side."""

    def __init__(self, policy: Any, reference: Any, beta: float) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference
        self.beta = beta

    def forward(
        self,
        input_ids: Tensor,
        places: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,  # noqa: ARG002 - decoders have no segments
        response_starts: Tensor | None = None,
        position_ids: Tensor | None = None,  # noqa: ARG002 - its texts are padded
        layout: Layout | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Score a batch; see ``RewardNetwork.forward``."""
        if response_starts is None or attention_mask is None:
            raise ModelError("texts for a DPO model must say where the response begins; render them with its own spec")
        first = int(response_starts.min())
        rows = max(
            1, MOST_LOGITS // ((input_ids.shape[1] - first + 1) * self.policy.config.get_text_config().vocab_size)
        )
        batch = (input_ids, attention_mask, places[:, 0], response_starts)
        parts = [[tensor[start : start + rows] for tensor in batch] for start in range(0, len(input_ids), rows)]
        return torch.cat([self._score(*part) for part in parts])

    def _score(self, input_ids: Tensor, mask: Tensor, last: Tensor, starts: Tensor) -> Tensor:
        policy, reference = (
            response_log_probability(model, input_ids, mask, last, starts) for model in (self.policy, self.reference)
        )
        return self.beta * (policy - reference)


def response_log_probability(model: Any, input_ids: Tensor, mask: Tensor, last: Tensor, starts: Tensor) -> Tensor:
    """Sum of the response tokens' log-probabilities, one float32 number per text.

    Args:
        model: Causal language model.
        input_ids: Texts × tokens, padded on the right.
        mask: 1 for real tokens.
        last: Position of each text's last real token.
        starts: Position of each response's first token, at least 1.
    """
    first = int(starts.min())
    # The token at a position is predicted by the state before it; states before the first response need no logits.
    kept = input_ids.shape[1] - first + 1
    outputs = model(input_ids=input_ids, attention_mask=mask, use_cache=False, logits_to_keep=kept)
    tokens = input_ids[:, first:]
    log_probabilities = outputs.logits[:, -kept:-1].float().log_softmax(dim=-1)
    each = log_probabilities.gather(2, tokens.unsqueeze(2)).squeeze(2)
    positions = torch.arange(first, input_ids.shape[1], device=input_ids.device)
    in_response = (positions >= starts.unsqueeze(1)) & (positions <= last.unsqueeze(1))
    return cast(Tensor, (each * in_response).sum(dim=1))


def load(
    files: ModelFiles,
    spec: RewardModelSpec,
    dtype: torch.dtype,
    tokenizer: Any,  # noqa: ARG001 - of no use here
) -> ImplicitRewardNetwork:
    """Load a DPO model and its reference.

    Raises:
        ModelError: Weights of one of them cannot be read or are missing.
    """
    reference = cast(StoredModel, files.reference)
    policy, other = (_load_causal(model, spec, dtype) for model in (files.model, reference))
    return ImplicitRewardNetwork(policy, other, spec.dpo_beta)


def _load_causal(model: StoredModel, spec: RewardModelSpec, dtype: torch.dtype) -> Any:
    try:
        causal, report = AutoModelForCausalLM.from_pretrained(
            str(model.folder),
            dtype=dtype,
            attn_implementation=attention_of(spec),
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"the weights of the language model {model.name!r} cannot be loaded: {error}") from error
    check_nothing_is_made_up(report, model)
    outputs = next((name for name, module in causal.named_modules() if module is causal.get_output_embeddings()), None)
    if outputs is None:
        raise ModelError(f"the language model {model.name!r} has no output layer, so it gives no probabilities")
    replace_head(causal, outputs)
    return causal
