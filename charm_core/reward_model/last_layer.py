"""The last transformer layer, computed only where a score is read from it.

Of the hidden states after the last layer only those at a text's ``places`` are read, one or two per text. Every token's keys and
values are needed for them; its query, its attention, and what follows attention are not. That is ten twelfths of the layer.

Which linear layers those are is told by their names, and whether that was right by ``text_scoring.choose_batching``, which tries it
on the very texts.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from charm_core.reward_model.attention import READS_ONLY, Layout

_KEYS_AND_VALUES = re.compile(r"^(q?kv?|v|qkv)(_[ab])?_proj.*$|^(key|value|query_key_value|qkv|wqkv|in_proj|kv)$", re.I)
"""Linear layers, by a part of their dotted name, that every token needs; also where queries come from the same product."""


class _Rows:
    """Which rows the layer is computed at just now; None: all."""

    now: Tensor | None = None


class Trimmed:
    """A layer that is computed only where it is read, while rows are packed."""

    def __init__(self, layer: nn.Module) -> None:
        """Trim a layer; ``undo`` takes that back."""
        self._rows = _Rows()
        self._parts = list(layer.modules())
        self._linear = [
            part
            for name, part in layer.named_modules()
            if isinstance(part, nn.Linear) and not any(map(_KEYS_AND_VALUES.match, name.split(".")))
        ]
        for part in self._parts:
            setattr(part, READS_ONLY, True)
        for part in self._linear:
            part.forward = partial(_at_rows, part.forward, self._rows)  # type: ignore[method-assign]
        self._hook = layer.register_forward_pre_hook(self._note, with_kwargs=True)

    def undo(self) -> None:
        """Compute the layer everywhere again."""
        self._hook.remove()
        for part in self._parts:
            delattr(part, READS_ONLY)
        for part in self._linear:
            del part.forward

    def _note(self, _layer: nn.Module, _arguments: Any, options: dict[str, Any]) -> None:
        layout: Layout | None = options.get("layout")
        self._rows.now = None if layout is None else layout.reads


def _at_rows(forward: Any, rows: _Rows, states: Tensor) -> Tensor:
    """Apply a linear layer at some rows of the only text, 1 × tokens × width; zero elsewhere."""
    if rows.now is None or states.ndim != 3:
        return forward(states)  # type: ignore[no-any-return]
    some = forward(states[:, rows.now])
    everywhere = torch.zeros((1, states.shape[1], some.shape[-1]), dtype=some.dtype, device=some.device)
    return everywhere.index_copy(1, rows.now, some)
