"""Fine-tuning by LoRA adapters, which PEFT puts into the network and which are merged into it before it is saved.

Only the adapters and the head are trained. What is saved is a plain model of the same kind as before, and loads without PEFT.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from charm_core.errors import TrainingError
from charm_core.reward_model.network import TrainableNetwork, transformer_layers
from charm_core.reward_model.spec import TrainingConfig


def add_adapters(network: TrainableNetwork, config: TrainingConfig) -> None:
    """Put adapters into the linear layers of the transformer layers, and leave only them and the head trainable.

    With ``trainable_layers`` only the last so many transformer layers get some. An adapter changes no score before it is
    trained. Its first weights depend on ``seed`` alone.

    Raises:
        TrainingError: A name of ``lora_targets`` is that of no linear layer there.
    """
    if config.lora_rank is None:
        return
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=0.0,
        target_modules=_targets(network, config),
    )
    torch.manual_seed(config.seed)
    classifier: Any = network.classifier
    inject_adapter_in_model(settings, classifier)
    # PEFT freezes everything but its own
    network.classifier.get_submodule(network.head_name).requires_grad_(True)
    network.eval()


def merge_adapters(network: TrainableNetwork) -> None:
    """Add what the adapters have learnt to the weights below them, and take the adapters away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        network.set_submodule(name, layer.get_base_layer())


def _targets(network: TrainableNetwork, config: TrainingConfig) -> list[str]:
    """Dotted names in ``classifier`` of the layers that get an adapter."""
    found = dict(_linear_layers(network, config.trainable_layers))
    unknown = sorted(set(config.lora_targets) - {name.rpartition(".")[2] for name in found})
    if unknown:
        raise TrainingError(
            f"lora_targets names {unknown[0]!r}, which is no linear layer of the transformer layers to be trained; they are "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in found}))}"
        )
    return [name for name in found if not config.lora_targets or name.rpartition(".")[2] in config.lora_targets]


def _linear_layers(network: TrainableNetwork, last: int | None) -> Iterator[tuple[str, nn.Linear]]:
    kept = {id(module) for layer in transformer_layers(network, last) for module in layer.modules()}
    for name, module in network.classifier.named_modules():
        if id(module) in kept and isinstance(module, nn.Linear):
            yield name, module
