"""A tiny reward model behind each route of vLLM and SGLang: the same scores as on this machine, whatever the server does."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from prefect import flow
from pydantic import ValidationError

from charm_core.errors import CharmError, ConfigError, ModelError, ServiceError
from charm_core.reward_model.loading import RewardModel, load_reward_model
from charm_core.reward_model.rendering import Rendered
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.text_scoring import score_texts
from charm_core.tables import PROMPTS, RESPONSES, SCORES
from tasks.caching import use_store
from tasks.endpoint import Endpoint
from tasks.prompts import ResponseSet
from tasks.remote_scoring import RemoteScorerConfig, RemoteScores, score_remotely
from tasks.store import ArtifactStore
from tests.charm_core.reward_model import tiny
from tests.endpoint_server import Asked, EndpointServer, Reply, failure

pytestmark = pytest.mark.usefixtures("prefect_session")

Change = Callable[[list[float]], list[float]]
PROMPT_COUNT = 30


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with use_store(ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))) as store:
        yield store


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    return load_reward_model(RewardModelSpec(path=str(tiny.save_model(tmp_path_factory.mktemp("decoder")))))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    return load_reward_model(RewardModelSpec(path=str(tiny.save_model(tmp_path_factory.mktemp("encoder"), "bert"))))


TABLES = tiny.prompts_and_responses(PROMPT_COUNT, seed=7)


def response_set(store: ArtifactStore) -> ResponseSet:
    prompts, responses = TABLES
    return ResponseSet(
        prompts=store.write_table(prompts, PROMPTS),
        responses=store.write_table(responses, RESPONSES),
        policy_models=("a", "b", "c"),
    )


class Scorer:
    """Answers like vLLM and SGLang do, with a real model."""

    def __init__(self, model: RewardModel, *, honours_use_activation: bool = True, squash: bool = True) -> None:
        self.model, self.honours, self.squash = model, honours_use_activation, squash
        self.turn = threading.Lock()
        self.most = 0

    def __call__(self, asked: Asked) -> Reply | None:
        body = asked.body
        texts = self.texts(body)
        self.most = max(self.most, len(texts))
        if any(max(ids, default=0) >= len(tiny.VOCABULARY) for ids, _ in texts):
            return failure(400, "token id out of vocabulary")
        values = self.values(texts)
        if asked.path == "/classify" and "input_ids" in body:
            return Reply([{"embedding": [value], "meta_info": {"prompt_tokens": 3}} for value in values])
        if asked.path == "/v1/classify":
            return Reply({"data": [{"index": n, "label": "LABEL_0", "probs": [1.0]} for n in range(len(values))]})
        if self.squash and not (self.honours and body.get("use_activation") is False):
            values = torch.tensor(values).sigmoid().tolist()
        data = {
            "/classify": lambda n: {"index": n, "label": None, "probs": [values[n]], "num_classes": 1},
            "/pooling": lambda n: {"index": n, "object": "pooling", "data": [values[n]]},
            "/score": lambda n: {"index": n, "object": "score", "score": values[n]},
        }[asked.path]
        return Reply(
            {"object": "list", "model": body["model"], "data": [data(n) for n in reversed(range(len(values)))]}
        )

    def texts(self, body: dict[str, Any]) -> list[tuple[list[int], list[int] | None]]:
        tokenizer = self.model.tokenizer
        if "messages" in body:
            text = tokenizer.apply_chat_template(body["messages"], tokenize=False)
            return [(tokenizer(text, add_special_tokens=False)["input_ids"], None)]
        if "text_1" in body:
            pairs = tokenizer(body["text_1"], body["text_2"])
            return list(zip(pairs["input_ids"], pairs["token_type_ids"], strict=True))
        return [(ids, None) for ids in body.get("input", body.get("input_ids"))]

    def values(self, texts: list[tuple[list[int], list[int] | None]]) -> list[float]:
        rendered = [
            Rendered(
                input_ids=tuple(ids),
                token_type_ids=None if types is None else tuple(types),
                prompt_cut=False,
                response_cut=False,
            )
            for ids, types in texts
        ]
        with self.turn:
            return score_texts(self.model, rendered)


def config(server: EndpointServer, model: RewardModel | None, **settings: Any) -> RemoteScorerConfig:
    endpoint = {"base_url": server.url, "model": "rm", "concurrency": 4, "timeout_seconds": 20.0, "max_tries": 4}
    return RemoteScorerConfig.model_validate(
        {
            "endpoint": endpoint | settings.pop("endpoint", {}),
            "reward_model": None
            if model is None
            else model.spec.model_copy(update={"max_length": 4096, "kind": "auto"}),
            **settings,
        }
    )


@flow
def score(responses: ResponseSet, scorer: RemoteScorerConfig) -> RemoteScores:
    return score_remotely(responses, scorer)


def difference(store: ArtifactStore, found: RemoteScores, model: RewardModel) -> float:
    local = score_responses(model.spec, *TABLES).scores
    joined = store.read_table(found.scores, SCORES).join(local, on=["prompt_id", "policy_model"], suffix="_local")
    assert joined.height == local.height == PROMPT_COUNT * 3
    assert float(local.get_column("score").std() or 0) > 0.01  # type: ignore[arg-type]
    return float((joined.get_column("score") - joined.get_column("score_local")).abs().max())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("route", "send"),
    [
        ("vllm_classify", "tokens"),
        ("vllm_classify", "messages"),
        ("vllm_pooling", "tokens"),
        ("vllm_pooling", "messages"),
        ("sglang_classify", "tokens"),
    ],
)
def test_remote_scores_are_local_scores(store: ArtifactStore, decoder: RewardModel, route: str, send: str):
    scorer = Scorer(decoder)
    with EndpointServer(scorer) as server:
        rendering = decoder if send == "tokens" else None
        found = score(response_set(store), config(server, rendering, route=route, send=send, batch_size=7))
    assert difference(store, found, decoder) < 1e-5
    assert (found.texts, found.refused, found.warnings) == (PROMPT_COUNT * 3, 0, ())
    assert scorer.most == (7 if send == "tokens" else 1)
    assert found.lowest < found.highest


def test_pairs_for_a_cross_encoder(store: ArtifactStore, encoder: RewardModel):
    with EndpointServer(Scorer(encoder)) as server:
        found = score(response_set(store), config(server, None, route="vllm_score"))
        assert difference(store, found, encoder) < 1e-5
        # segment ids cannot be sent
        with pytest.raises(ModelError, match="use route 'vllm_score'"):
            score(response_set(store), config(server, encoder))


def test_a_second_run_asks_nothing_and_an_interrupted_one_goes_on(store: ArtifactStore, decoder: RewardModel):
    scorer = Scorer(decoder)
    requests = 0

    def breaks(asked: Asked) -> Reply | None:
        return failure(503, "down") if len(server.asked) > requests > 0 else scorer(asked)

    with EndpointServer(breaks) as server:
        settings = config(server, decoder, batch_size=4, shard_prompts=5, endpoint={"max_tries": 1, "concurrency": 1})
        requests = 12
        with pytest.raises(ServiceError, match="what was answered before is kept"):
            score(response_set(store), settings)
        stopped, requests = len(server.asked), 0
        found = score(response_set(store), settings)
        resumed = len(server.asked) - stopped
        assert difference(store, found, decoder) < 1e-5
        assert score(response_set(store), settings) == found
        moved = settings.model_copy(
            update={"batch_size": 9, "endpoint": settings.endpoint.model_copy(update={"concurrency": 2})}
        )
        assert score(response_set(store), moved) == found
        assert len(server.asked) == stopped + resumed
    everything = PROMPT_COUNT * 3 / 4
    assert 0 < resumed < everything


def test_faults_on_the_way_change_nothing(store: ArtifactStore, decoder: RewardModel):
    scorer = Scorer(decoder)

    def faulty(asked: Asked) -> Reply | None:
        reply = scorer(asked)
        assert reply is not None
        faults = {
            1: failure(500, "out of luck"),
            2: failure(429, "slow down", Retry_After="0.05"),
            3: Reply(reply.body, cut="half"),
            4: Reply(b"not json"),
            5: Reply({"data": [*reply.body["data"][1:], {"index": 99, "probs": [0.0]}]}),
            6: Reply({"data": reply.body["data"][:-1]}),
        }
        return faults.get(asked.number, reply)

    with EndpointServer(faulty) as server:
        found = score(
            response_set(store), config(server, decoder, batch_size=8, endpoint={"concurrency": 3, "max_tries": 6})
        )
    assert difference(store, found, decoder) < 1e-5


def test_one_text_that_is_refused_does_not_take_its_batch_with_it(store: ArtifactStore, decoder: RewardModel):
    scorer = Scorer(decoder)
    longest = 22

    def refuses_long_texts(asked: Asked) -> Reply | None:
        long = max(len(ids) for ids in asked.body["input"]) > longest
        return failure(400, f"maximum context length is {longest} tokens") if long else scorer(asked)

    with EndpointServer(refuses_long_texts) as server:
        settings = config(server, decoder, batch_size=10)
        with pytest.raises(
            ServiceError, match=r"refused \d+ of 90 texts, and max_failed_share allows 0: 400: maximum context length"
        ):
            score(response_set(store), settings)
        found = score(response_set(store), settings.model_copy(update={"max_failed_share": 0.5}))
        assert 0 < found.refused < 45
        assert store.read_table(found.scores, SCORES).height == 90 - found.refused
        assert found.warnings[0].startswith(
            f"The server refused {found.refused} texts, which have no score: 400: maximum"
        )
        assert settings.reward_model is not None
        shorter = settings.model_copy(
            update={"reward_model": settings.reward_model.model_copy(update={"max_length": longest})}
        )
        cut = score(response_set(store), shorter)
        assert (cut.refused, cut.responses_cut + cut.prompts_cut > 0) == (0, True)


def test_a_sigmoid_is_noticed_before_everything_is_asked_and_undone_without_asking_again(
    store: ArtifactStore, decoder: RewardModel
):
    with EndpointServer(Scorer(decoder, honours_use_activation=False)) as server:
        settings = config(server, decoder, shard_prompts=8)
        with pytest.raises(ConfigError, match=r"scores lie from 0 to 1 .*: the server seems to apply a sigmoid"):
            score(response_set(store), settings)
        first = len(server.asked)
        undone = score(response_set(store), settings.model_copy(update={"activation": "sigmoid"}))
        assert difference(store, undone, decoder) < 1e-4  # single precision went through a sigmoid and back
        asked = len(server.asked)
        assert first < asked
        squashed = score(response_set(store), settings.model_copy(update={"activation": "off"}))
        assert 0 < squashed.lowest < squashed.highest < 1
        assert len(server.asked) == asked


def test_sglangs_other_route_is_found_out(store: ArtifactStore, decoder: RewardModel):
    with (
        EndpointServer(Scorer(decoder)) as server,
        pytest.raises(
            ConfigError, match=r"all \d+ scores are exactly 1: the server applies a softmax .*'sglang_classify'"
        ),
    ):
        score(response_set(store), config(server, decoder, route="sglang_v1_classify"))


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        (lambda asked: failure(404, "the model `rm` does not exist"), ConfigError, "answers 404"),
        (lambda asked: failure(401, "no key"), ConfigError, "answers 401"),
        (
            lambda asked: Reply({"data": [{"index": n, "probs": [0.4, 0.6]} for n in range(16)]}),
            ModelError,
            "2 numbers per text",
        ),
    ],
)
def test_servers_that_cannot_help(
    store: ArtifactStore,
    decoder: RewardModel,
    behaviour: Callable[[Asked], Reply],
    error: type[CharmError],
    message: str,
):
    with EndpointServer(behaviour) as server, pytest.raises(error, match=message):
        score(response_set(store), config(server, decoder))


ENDPOINT = Endpoint(base_url="http://127.0.0.1:9/v1", model="rm")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give reward_model, whose tokenizer renders the texts"),
        ({"send": "messages", "reward_model": RewardModelSpec(path="x")}, "messages are sent: leave it out"),
        ({"route": "sglang_classify", "send": "messages"}, "route 'sglang_classify' is sent tokens, not messages"),
        ({"route": "vllm_score", "send": "tokens"}, "route 'vllm_score' is sent pairs, not tokens"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        RemoteScorerConfig.model_validate({"endpoint": ENDPOINT, **settings})


def test_the_address_may_end_in_v1_or_not(store: ArtifactStore, decoder: RewardModel):
    with EndpointServer(Scorer(decoder)) as server:
        bare = server.url.removesuffix("/v1")
        found = score(response_set(store), config(server, decoder, endpoint={"base_url": bare, "deployment": "rm"}))
        assert {asked.path for asked in server.asked} == {"/classify"}
    assert difference(store, found, decoder) < 1e-5


def test_responses_without_their_prompt_are_an_error(store: ArtifactStore, decoder: RewardModel):
    responses = response_set(store)
    fewer = store.write_table(TABLES[0].filter(pl.col("prompt_id") != "p003"), PROMPTS)
    with (
        EndpointServer(Scorer(decoder)) as server,
        pytest.raises(CharmError, match="not in the prompts table, first 'p003'"),
    ):
        score(responses.model_copy(update={"prompts": fewer}), config(server, decoder))
