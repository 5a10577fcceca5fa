"""What comes back from servers of reward models: the form of each route's answers, and scores out of what may be squashed.

Written from the sources of vLLM (entrypoints/pooling: classify, pooling and scoring protocols, up to 0.25) and SGLang
(http_server ``/classify``, entrypoints/openai/serving_classify), as of 2026.

===================== ========================================= ==================================================
route                 request                                   answer
===================== ========================================= ==================================================
vllm_classify         /classify {model, input | messages}       data[i].{index, probs: [p]}; sigmoid unless told not to
vllm_pooling          /pooling {model, input | messages}        data[i].{index, data: [p] or one [p] per token}
vllm_score            /score {model, text_1, text_2}            data[i].{index, score}; sigmoid unless told not to
sglang_classify       /classify {model, input_ids}              [i].{embedding: [p]}
sglang_v1_classify    /v1/classify {model, input}               data[i].{index, probs}; always softmax
===================== ========================================= ==================================================
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from charm_core.errors import ConfigError, ModelError

FloatArray = NDArray[np.float64]
Route = Literal["vllm_classify", "vllm_pooling", "vllm_score", "sglang_classify", "sglang_v1_classify"]
Activation = Literal["auto", "off", "sigmoid"]

_SUSPICIOUS = 16
"""So many scores, all from 0 to 1, are no chance."""
_COARSE = 10.0
"""A sigmoid in single precision tells scores above this apart by more than a thousandth only."""


def request_body(route: Route, model: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """What is sent.

    Args:
        route: Where to.
        model: Name of the model at the server.
        content: ``tokens`` (a list of lists of ids), ``messages`` (one conversation) or ``pairs`` (prompts and responses).
    """
    if route == "sglang_classify":
        return {"model": model, "input_ids": content["tokens"]}
    if route == "sglang_v1_classify":
        return {"model": model, "input": content["tokens"]}
    if route == "vllm_score":
        prompts, responses = content["pairs"]
        return {"model": model, "text_1": prompts, "text_2": responses, "use_activation": False}
    texts = {"input": content["tokens"]} if "tokens" in content else {"messages": content["messages"]}
    # the template writes the special tokens, ours or the server's
    return {"model": model, **texts, "add_special_tokens": False, "use_activation": False}


def read_scores(route: Route, answer: object, count: int) -> list[float]:
    """The scores in an answer, in the order of the texts.

    Args:
        route: Where the answer comes from.
        answer: Its JSON.
        count: Texts that were sent.

    Raises:
        ValueError: It is not what the route answers.
        ModelError: The model does not give one number per text.
    """
    entries = answer if route == "sglang_classify" else answer.get("data") if isinstance(answer, Mapping) else None
    if isinstance(entries, Mapping) and count == 1:
        entries = [entries]  # SGLang answers a single text without a list
    if (
        not isinstance(entries, list)
        or len(entries) != count
        or not all(isinstance(entry, Mapping) for entry in entries)
    ):
        raise ValueError(f"{count} texts were sent and the answer is {_excerpt(answer)}")
    values = [_value(route, entry) for entry in entries]
    if route == "sglang_classify":
        return values  # in order, without an index
    order = [entry.get("index") for entry in entries]
    if sorted(place for place in order if isinstance(place, int)) != list(range(count)):
        raise ValueError(f"the indices of the answer are {order[:20]}, not those of {count} texts")
    return [value for _, value in sorted(zip(order, values, strict=True))]


def undo_activation(values: FloatArray, activation: Activation) -> tuple[FloatArray, tuple[str, ...]]:
    """Scores from what a server sent, and what is to be said about them.

    Args:
        values: As they came.
        activation: ``off``: they are scores. ``sigmoid``: they went through a sigmoid, which is undone. ``auto``: they must be
            scores, and the more than a few that all lie from 0 to 1 are an error.

    Raises:
        ConfigError: They went through a sigmoid or softmax, or did not though they should have.
    """
    squashed = bool(((values >= 0) & (values <= 1)).all())
    if values.size > 1 and (values == 1.0).all():
        raise ConfigError(
            f"all {values.size} scores are exactly 1: the server applies a softmax to its single label; use another route "
            "('sglang_classify' for SGLang), or start the server without it"
        )
    if activation == "auto" and squashed and values.size >= _SUSPICIOUS:
        raise ConfigError(
            f"all {values.size} scores lie from 0 to 1 ({values.min():.4g} to {values.max():.4g}): the server seems to apply a sigmoid, "
            'which vLLM does by default. Start it with --pooler-config \'{"use_activation": false}\' (older versions: "activation"), or '
            "set activation = 'sigmoid' to have it undone here, or activation = 'off' if these are the model's scores"
        )
    if activation != "sigmoid":
        return values, ()
    if not squashed:
        raise ConfigError(
            f"activation is 'sigmoid', but the scores go from {values.min():.4g} to {values.max():.4g}: they did not go through one; set "
            "activation = 'off'"
        )
    lost = int(((values <= 0) | (values >= 1)).sum())
    if lost:
        raise ConfigError(
            f"{lost} of {values.size} scores are exactly 0 or 1: the server's sigmoid has rounded them away; start the server without it"
        )
    scores = np.log(values) - np.log1p(-values)
    coarse = int((scores > _COARSE).sum())
    said = (
        f"The server's sigmoid was undone; {coarse:,} scores are above {_COARSE:g}, where it leaves few digits."
        if coarse
        else ""
    )
    return scores, (said,) if said else ()


def _value(route: Route, entry: Mapping[str, Any]) -> float:
    field = {"vllm_score": "score", "vllm_pooling": "data", "sglang_classify": "embedding"}.get(route, "probs")
    value = entry.get(field)
    if route == "vllm_pooling" and isinstance(value, list) and value and isinstance(value[-1], list):
        value = value[-1]  # one per token: the score is that of the last one
    if isinstance(value, list):
        if len(value) != 1:
            raise ModelError(
                f"the server gives {len(value)} numbers per text, so its model is no reward model with one score"
            )
        value = value[0]
    if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
        raise ValueError(f"{field!r} is {_excerpt(entry.get(field))}, not a finite number")
    return float(value)


def _excerpt(value: object) -> str:
    return repr(value)[:80]
