"""Responses of a policy model with vLLM in this process. vLLM is an optional extra, imported when it is asked for."""

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from charm_core.errors import ConfigError
from charm_core.reward_model.generation_job import PolicyModelSpec
from charm_core.sampling import Answer, Decoding, conversation, request_seed, status_of

CHUNK = 512
"""Prompts that are given to vLLM at once: it batches them by itself. An interruption loses at most these."""


def generate_answers(spec: PolicyModelSpec, decoding: Decoding, prompts: pl.DataFrame) -> Iterator[list[Answer]]:
    """Answer prompts, chunk by chunk.

    Args:
        spec: The policy model.
        decoding: How to answer. Of the model's own generation settings only its end-of-text tokens count.
        prompts: ``prompt_id`` and ``messages``.

    Raises:
        ConfigError: vLLM is not installed.
    """
    vllm = _vllm()
    engine = vllm.LLM(
        model=spec.path,
        revision=spec.revision,
        tokenizer_revision=spec.revision,
        dtype=spec.dtype,
        tensor_parallel_size=spec.tensor_parallel,
        max_model_len=spec.max_model_length,
        trust_remote_code=spec.trust_remote_code,
        generation_config="vllm",
    )
    for chunk in prompts.select("prompt_id", "messages").iter_slices(CHUNK):
        yield _answers(vllm, engine, decoding, chunk.rows())


def _answers(
    vllm: Any, engine: Any, decoding: Decoding, rows: Sequence[tuple[str, list[dict[str, str]]]]
) -> list[Answer]:
    results = engine.chat(
        [conversation(messages, decoding.system_prompt) for _, messages in rows],
        sampling_params=[_parameters(vllm, decoding, prompt_id) for prompt_id, _ in rows],
        use_tqdm=False,
    )
    return [_answer(prompt_id, result) for (prompt_id, _), result in zip(rows, results, strict=True)]


def _parameters(vllm: Any, decoding: Decoding, prompt_id: str) -> Any:
    return vllm.SamplingParams(
        temperature=decoding.sampling_temperature,
        top_p=decoding.top_p,
        max_tokens=decoding.max_tokens,
        seed=request_seed(decoding.seed, prompt_id),
        stop=list(decoding.stop),
    )


def _answer(prompt_id: str, result: Any) -> Answer:
    output = result.outputs[0]
    return Answer(
        prompt_id=prompt_id,
        response=output.text,
        status=status_of(output.text, output.finish_reason),
        finish_reason=output.finish_reason,
        prompt_tokens=len(result.prompt_token_ids),
        response_tokens=len(output.token_ids),
    )


def _vllm() -> Any:
    try:
        import vllm  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            f"the vllm back end needs vLLM, which cannot be imported ({error}): pip install 'charm-rm[vllm]' on a machine with a "
            "GPU, or serve the model and use the openai back end"
        ) from None
    return vllm
