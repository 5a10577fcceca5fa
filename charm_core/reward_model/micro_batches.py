"""How the texts of a training go through the network: in packed rows where the reward model takes them, as in scoring."""

import logging
from collections.abc import Sequence

from charm_core.reward_model.batching import Cost, PairGroup, packed_cost, padded_cost, share_out
from charm_core.reward_model.loading import RewardModel
from charm_core.reward_model.network import Batch
from charm_core.reward_model.packing import PrefixGroup
from charm_core.reward_model.plan import TrainingData
from charm_core.reward_model.text_scoring import choose_batching, groups_of, inputs_of

logger = logging.getLogger(__name__)


class MicroBatches:
    """The texts of a training; what the responses to a prompt share is found once for all steps."""

    def __init__(self, model: RewardModel, data: TrainingData) -> None:
        """Find out whether rows can be packed, by trying.

        Args:
            model: As it was loaded. If rows can be packed, its network takes only those from now on.
            data: Texts and pairs.

        Raises:
            ModelError: See ``choose_batching``.
        """
        groups = [*data.train, *data.held_out]
        owner = {text: group.prompt_id for group in groups for text in group.texts}
        owners = [owner[text] for text in range(len(data.texts))]
        self._texts = data.texts
        self._model, check = choose_batching(model, data.texts, owners, trimmed=False)
        self._prefixes: dict[str, list[PrefixGroup]] = {group.prompt_id: [] for group in groups}
        for prefix in groups_of(self._model, data.texts, owners):
            self._prefixes[owners[prefix.texts[0]]].append(prefix)
        self._cost: Cost = (
            packed_cost(self._prefixes, data.lengths) if self._model.packed else padded_cost(data.lengths)
        )
        self._filler = PrefixGroup(texts=(data.lengths.index(min(data.lengths)),), shared=0)
        logger.info("texts are %s", "packed" if check.refusal is None else f"padded: {check.refusal}")

    def share(self, groups: Sequence[PairGroup], *, ranks: int, budget: int) -> list[list[list[PairGroup]]]:
        """Deal groups out to ranks and micro-batches; see ``share_out``."""
        return share_out(groups, self._cost, ranks=ranks, budget=budget)

    def inputs(self, batch: Sequence[PairGroup]) -> tuple[Batch, list[int]]:
        """What the network gets for a micro-batch, and which text each of its scores is of.

        For an empty one that is some short text, because ZeRO-3 communicates in every micro-batch.
        """
        prefixes = [prefix for group in batch for prefix in self._prefixes[group.prompt_id]] or [self._filler]
        return inputs_of(self._model, prefixes, self._texts), [text for prefix in prefixes for text in prefix.texts]
