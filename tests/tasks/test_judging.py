"""A judge on loopback: both orders, second tries, faults, and leanings that are planted and found."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect import flow
from pydantic import ValidationError

from charm_core.errors import ConfigError, SamplingError, ServiceError
from charm_core.tables import PREFERENCES, PROMPTS, RESPONSES
from tasks.caching import use_store
from tasks.judging import JudgeConfig, Judged, judge_responses
from tasks.policy_models import OpenAIBackend
from tasks.prompts import ResponseSet
from tasks.store import ArtifactStore
from tests.endpoint_server import Asked, EndpointServer, Reply, completion, failure

pytestmark = pytest.mark.usefixtures("prefect_session")

PROMPT_COUNT = 12


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with use_store(ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))) as store:
        yield store


def response_set(store: ArtifactStore, models: str = "abc", prompts: int = PROMPT_COUNT) -> ResponseSet:
    """Policy model ``a`` writes best and ``c`` worst; ``b`` writes most."""
    asked = [
        {"prompt_id": f"p{n}", "prompt_set": "all", "messages": [{"role": "user", "content": f"ask {n}"}]}
        for n in range(prompts)
    ]
    quality = {"a": 3, "b": 2, "c": 1}
    rows = [
        (f"p{n}", model, f"quality {quality[model]} by {model} on {n}" + (" and more" if model == "b" else ""))
        for n in range(prompts)
        for model in models
    ]
    return ResponseSet(
        prompts=store.write_table(pl.DataFrame(asked, schema=dict(PROMPTS.columns)), PROMPTS),
        responses=store.write_table(pl.DataFrame(rows, schema=dict(RESPONSES.columns), orient="row"), RESPONSES),
        policy_models=tuple(models),
    )


def shown(asked: Asked) -> tuple[str, str]:
    """The two responses in the judge's first message."""
    question = asked.body["messages"][0]["content"]
    first, second = (
        re.search(f"<{place}-message>\n(.*)\n</{place}-message>", question, re.DOTALL) for place in ("first", "second")
    )
    assert first is not None
    assert second is not None
    return first[1], second[1]


def fair(asked: Asked) -> Reply:
    """Sees quality and nothing else."""
    qualities = [int(text.split()[1]) for text in shown(asked)]
    mark = "[[TIE]]" if qualities[0] == qualities[1] else "[[FIRST]]" if qualities[0] > qualities[1] else "[[SECOND]]"
    return Reply(completion(f"I have weighed them.\n{mark}"))


def config(server: EndpointServer, **settings: Any) -> JudgeConfig:
    backend = {"model": "tiny", "deployment": "tiny@1", "concurrency": 4, "timeout_seconds": 20.0, "max_tries": 3}
    backend |= {"cost_per_million_prompt_tokens": 1.0, "cost_per_million_response_tokens": 2.0} | settings.pop(
        "backend", {}
    )
    return JudgeConfig(backend=OpenAIBackend(base_url=server.url, **backend), **settings)


@flow
def judge(responses: ResponseSet, settings: JudgeConfig) -> Judged:
    return judge_responses(responses, settings)


def preferences(store: ArtifactStore, judged: Judged) -> dict[tuple[str, str], set[float]]:
    found: dict[tuple[str, str], set[float]] = {}
    for _, a, b, value in store.read_table(judged.preferences, PREFERENCES).iter_rows():
        found.setdefault((a, b), set()).add(value)
    return found


def test_a_fair_judge(store: ArtifactStore):
    with EndpointServer(fair) as server:
        judged = judge(response_set(store), config(server))
        assert len(server.asked) == PROMPT_COUNT * 3 * 2
        sent = server.asked[0].body
        assert (sent["temperature"], sent["max_tokens"]) == (0.0, 2048)
    assert preferences(store, judged) == {("a", "b"): {1.0}, ("a", "c"): {1.0}, ("b", "c"): {1.0}}
    report = judged.report
    assert (report.judged, report.consistent, report.reversed, report.asked_again) == (36, 36, 0, 0)
    assert report.first_share.value == 0.5
    assert report.longer_share.value == pytest.approx(1 / 2)  # b is longer, loses to a and wins against c
    assert (judged.judge, judged.policy_models) == ("tiny", ("a", "b", "c"))
    assert judged.cost is not None
    assert judged.cost > 0
    assert judged.sentences()[0].startswith("tiny judged 36 of 36 comparisons on 12 prompts, each in both orders.")


def test_a_judge_that_sees_places_only_decides_nothing(store: ArtifactStore):
    with EndpointServer(lambda asked: Reply(completion("[[FIRST]]"))) as server:
        judged = judge(response_set(store), config(server))
    assert set().union(*preferences(store, judged).values()) == {0.5}
    assert (judged.report.consistent, judged.report.reversed, judged.report.first_share.value) == (0, 36, 1.0)
    assert "leans towards a place" in judged.sentences()[1]


def test_what_has_no_verdict_is_asked_again_once_and_then_left_out(store: ArtifactStore):
    def reluctant(asked: Asked) -> Reply:
        first, second = shown(asked)
        again = len(asked.body["messages"]) == 3
        if "by c" in first and "by b" in second:
            return Reply(completion("Both have their merits."))  # never
        if "on 3" in first and not again:
            return Reply(completion("The first, clearly.", finish_reason="length"))
        return fair(asked)

    with EndpointServer(reluctant) as server:
        judged = judge(response_set(store), config(server))
        again = [asked for asked in server.asked if len(asked.body["messages"]) == 3]
        roles = [message["role"] for message in again[0].body["messages"]]
    assert roles == ["user", "assistant", "user"]
    report = judged.report
    assert report.unreadable == PROMPT_COUNT
    assert report.judged == PROMPT_COUNT * 2
    assert report.asked_again == len(again) == PROMPT_COUNT + 5
    assert preferences(store, judged) == {("a", "b"): {1.0}, ("a", "c"): {1.0}}
    assert "12 are left out because an answer had no verdict" in judged.sentences()[0]


def test_refused_requests_are_counted_and_too_many_are_an_error(store: ArtifactStore):
    def refuses(asked: Asked) -> Reply:
        return (
            failure(400, "too long")
            if "on 1" in asked.prompt.split("<first-message>")[-1].split("</")[0]
            else fair(asked)
        )

    with EndpointServer(refuses) as server:
        judged = judge(response_set(store), config(server, max_failed_share=0.5))
        assert 0 < judged.report.failed < 36
        assert judged.report.failed + judged.report.judged == 36
        assert judged.report.unreadable == 0
        with pytest.raises(SamplingError, match="400: too long"):
            judge(response_set(store), config(server, max_failed_share=0.01, backend={"deployment": "tiny@2"}))


def test_an_interrupted_judge_goes_on_and_a_second_run_asks_nothing(store: ArtifactStore):
    down_after: int | None = 20

    def breaks(asked: Asked) -> Reply:
        return failure(503, "down") if down_after is not None and len(server.asked) > down_after else fair(asked)

    with EndpointServer(breaks) as server:
        settings = config(server, backend={"concurrency": 1, "max_tries": 1})
        with pytest.raises(ServiceError):
            judge(response_set(store), settings)
        stopped, down_after = len(server.asked), None
        judged = judge(response_set(store), settings)
        assert judged.report.judged == 36
        assert len(server.asked) - stopped <= 72 - 20
        asked = len(server.asked)
        assert judge(response_set(store), settings).report == judged.report
        # another policy model costs its own comparisons only
        assert len(server.asked) == asked
        fewer = judge(response_set(store, "ab"), settings)
        assert len(server.asked) == asked
    assert fewer.report.judged == PROMPT_COUNT


def test_one_policy_model_against_the_others_on_some_prompts(store: ArtifactStore):
    with EndpointServer(fair) as server:
        judged = judge(response_set(store), config(server, against="b", max_prompts=5, policy_model="b"))
        assert len(server.asked) == 5 * 2 * 2
    assert preferences(store, judged) == {("a", "b"): {1.0}, ("b", "c"): {1.0}}
    assert judged.report.own_share is not None
    assert judged.report.own_share.value == 0.5
    assert "Where one of the responses is its own" in judged.sentences()[-1]


def test_other_words_and_marks(store: ArtifactStore):
    def answers(asked: Asked) -> Reply:
        assert asked.prompt.startswith("Q: ask ")
        return Reply(completion("[[A]]" if "by a" in asked.prompt.split("|")[1] else "[[B]]"))

    with EndpointServer(answers) as server:
        settings = config(
            server,
            template="Q: {conversation}|{first}|{second}| [[A]] or [[B]] or [[C]]?",
            marks={"first": "[[A]]", "second": "[[B]]", "tie": "[[C]]"},
        )
        judged = judge(response_set(store, "ab"), settings)
    assert preferences(store, judged) == {("a", "b"): {1.0}}


def test_settings_and_servers_that_cannot_work(store: ArtifactStore):
    with EndpointServer(lambda asked: failure(404, "no such model")) as server:
        with pytest.raises(ConfigError, match="no such model"):
            judge(response_set(store), config(server))
        with pytest.raises(ConfigError, match="no responses of 'd' to compare with"):
            judge(response_set(store), config(server, against="d"))
        with pytest.raises(ValidationError, match="must have each of its placeholders once"):
            config(server, template="Which is better?")
