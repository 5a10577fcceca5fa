"""Rules about arithmetic: what overflows, what is broken already, which attention can be had."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from charm_core.reward_model.findings import Finding
from charm_core.reward_model.preflight.facts import Facts, finding
from charm_core.reward_model.stored.files import StoredModel, StoredTensor

MOST_BYTES_READ = 128 * 1024**2
"""The smallest tensors come first; loading looks at all of them."""

_BITS = {"F16": (np.uint16, 10, 0x1F), "BF16": (np.uint16, 7, 0xFF), "F32": (np.uint32, 23, 0xFF)}
"""How many bits stand after the exponent, and its mask, by stored type."""
_FLOAT16_EXPONENT = 127 + 16
"""Exponent field, in the types that have 8 bits of it, from which a number is beyond float16."""


def finite_weights(facts: Facts) -> Iterator[Finding]:
    """No weight is NaN or infinite, as happens where float16 could not hold one."""
    for model in _models(facts):
        broken = [name for name, tensor, exponent in _largest_exponents(model) if exponent == _BITS[tensor.dtype][2]]
        if broken:
            overflowed = model.tensors[broken[0]].dtype == "F16"
            yield finding(
                "finite-weights",
                "error",
                f"{model.name!r} has NaN or infinite weights, first in {broken[0]}"
                + (
                    "; they are stored in float16, which ends at 65504. Take the original in bfloat16 or float32"
                    if overflowed
                    else ""
                )
                + ("" if overflowed else "; use an intact copy"),
            )


def float16_overflow(facts: Facts) -> Iterator[Finding]:
    """Weights made for a wider range are not computed with in float16."""
    if facts.spec.dtype != "float16":
        return
    for model in _models(facts):
        wide = sorted({tensor.dtype for tensor in model.tensors.values()} & {"BF16", "F32"})
        beyond = [
            name
            for name, tensor, exponent in _largest_exponents(model)
            if tensor.dtype in wide and exponent >= _FLOAT16_EXPONENT
        ]
        if beyond:
            yield finding(
                "float16",
                "error",
                f"{beyond[0]} of {model.name!r} has values beyond 65504, which float16 cannot hold: set reward_model.dtype to 'bfloat16' "
                "or 'float32'",
            )
        elif wide:
            yield finding(
                "float16",
                "warning",
                f"the weights of {model.name!r} are stored in {' and '.join(wide)}, but reward_model.dtype is 'float16': what "
                "exceeds 65504 on the way becomes infinite, and scores NaN. Set it to 'bfloat16', or to 'float32' where the GPU "
                "has no bfloat16",
            )


def attention_kernel(facts: Facts) -> Iterator[Finding]:
    """The attention kernel asked for is installed and does what the model needs."""
    if facts.spec.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        yield finding(
            "attention",
            "error",
            "reward_model.attention is 'flash_attention_2', but the package flash_attn is not installed here: install it, or set it to "
            "'auto'",
        )
    if facts.spec.attention == "sdpa" and facts.config.get("attn_logit_softcapping"):
        yield finding(
            "attention",
            "error",
            f"{facts.files.backbone.name!r} caps its attention scores (attn_logit_softcapping), which the kernel 'sdpa' cannot do: set "
            "reward_model.attention to 'auto' or 'eager'",
        )


def _models(facts: Facts) -> list[StoredModel]:
    return [model for model in (facts.files.model, facts.files.base, facts.files.reference) if model is not None]


def _largest_exponents(model: StoredModel) -> Iterator[tuple[str, StoredTensor, int]]:
    """Of the small tensors that are on this machine: name and the largest exponent field among its values."""
    left = MOST_BYTES_READ
    for name, tensor in sorted(model.tensors.items(), key=lambda item: (item[1].size, item[0])):
        left -= tensor.size
        if left < 0:
            return
        if tensor.dtype in _BITS and tensor.size:
            kind, after, mask = _BITS[tensor.dtype]
            with Path(model.folder, tensor.file).open("rb") as file:
                file.seek(tensor.start)
                bits = np.frombuffer(file.read(tensor.size), dtype=kind)
            yield name, tensor, int((bits & (mask << after)).max() >> after)
