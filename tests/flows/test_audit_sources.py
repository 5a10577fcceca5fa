"""Audits whose responses are sampled in the run, judged or scored by servers on loopback."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from charm_core.errors import ConfigError, RatingsError
from charm_core.mismatch import MismatchConfig
from charm_core.sampling import Decoding
from flows.audit import audit
from flows.outcome import Outcome
from flows.runs import AuditRun, CalibrationRun
from tasks.arena import ArenaConfig
from tasks.endpoint import Endpoint
from tasks.gathering import SamplingConfig
from tasks.judging import JudgeConfig
from tasks.pages.report_data import ReportData
from tasks.policy_models import OpenAIBackend, PolicyModel, ReplayBackend
from tasks.prompt_sets import PromptSetConfig
from tasks.remote_scoring import RemoteScorerConfig
from tests.endpoint_server import Asked, EndpointServer, Reply, completion, failure

QUALITY = {"sky": 4, "sea": 3, "sand": 2}
OVERRATED = "sand"
PROMPTS = 30
QUICK = MismatchConfig(bootstrap_replicates=100)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_session: None) -> Path:
    monkeypatch.setenv("CHARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CANARY_KEY", "sk-canary-7d1f")
    return tmp_path


def answer(asked: Asked) -> Reply | None:
    """Policy models write how good they are; the judge and the scorer read that, and like ``sand`` too much."""
    if asked.headers.get("authorization") != "Bearer sk-canary-7d1f":
        return failure(401, "wrong key")
    if asked.path == "/score":
        values = [liking(text) for text in asked.body["text_2"]]
        return Reply(
            {"object": "list", "model": "rm", "data": [{"index": n, "score": v} for n, v in enumerate(values)]}
        )
    model, question = asked.body["model"], asked.body["messages"][-1]["content"]
    if model == "judge":
        first, second = re.findall(r"-message>\n(.*)\n</", asked.body["messages"][0]["content"])
        return Reply(completion("[[FIRST]]" if liking(first) > liking(second) else "[[SECOND]]", model="judge"))
    number = int(question.split()[-1])
    if model == "sea" and number % 10 == 3:
        return Reply(completion("", model=model))
    return Reply(
        completion(f"written by {model} on {number}", finish_reason="length" if number == 5 else "stop", model=model)
    )


def liking(text: str) -> float:
    found = re.search(r"(\w+) on (\d+)", text)
    if found is None:
        return -9.0
    model, number = found[1], int(found[2])
    return QUALITY[model] + (2.5 if model == OVERRATED else 0.0) + (number * QUALITY[model]) % 5


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with EndpointServer(answer) as running:
        yield running


def backend(server: EndpointServer, model: str) -> OpenAIBackend:
    return OpenAIBackend(
        base_url=server.url, model=model, deployment=model, api_key="CANARY_KEY", concurrency=4, max_tries=2
    )


def sources(folder: Path, server: EndpointServer) -> dict[str, object]:
    board = folder / "board.csv"
    board.write_text("policy_model,rating\n" + "\n".join(f"{name},{1000 + 40 * q}" for name, q in QUALITY.items()))
    questions = folder / "questions.jsonl"
    questions.write_text("\n".join(json.dumps({"prompt": f"question {n}"}) for n in range(PROMPTS)))
    models = [PolicyModel(name=name, backend=backend(server, name)) for name in QUALITY]
    sampling = SamplingConfig(
        prompts=PromptSetConfig(source=str(questions)), policy_models=tuple(models), decoding=Decoding(max_tokens=9)
    )
    return {"arena": ArenaConfig(source=str(board)), "sampling": sampling, "mismatch": QUICK}


def data_of(outcome: Outcome) -> ReportData:
    return ReportData.model_validate_json(Path(outcome.data.uri).read_bytes())


def test_a_judge_audits_responses_that_are_sampled_first(home: Path, server: EndpointServer):
    run = AuditRun(name="judged", judge=JudgeConfig(backend=backend(server, "judge")), **sources(home, server))
    data = data_of(audit(run))
    assert data.reward_model == "judge"
    models = {model.policy_model: model.overvaluation.value for model in data.main.variants[0].mismatch.models}
    assert max(models, key=models.__getitem__) == OVERRATED
    rows = {row.policy_model: row.counts for row in data.responses}
    assert (rows["sea"].empty, rows["sea"].truncated, rows["sky"].truncated) == (3, 1, 1)
    assert any("are for the response shown first" in note for note in data.notes)  # how it leans on positions


def test_a_server_scores_them(home: Path, server: EndpointServer):
    scorer = RemoteScorerConfig(
        endpoint=Endpoint(base_url=server.url, model="rm", api_key="CANARY_KEY", max_tries=2), route="vllm_score"
    )
    outcome = audit(AuditRun(name="scored", scorer=scorer, **sources(home, server)))
    models = {m.policy_model: m.overvaluation.value for m in data_of(outcome).main.variants[0].mismatch.models}
    assert max(models, key=models.__getitem__) == OVERRATED
    assert data_of(outcome).main.variants[0].mismatch.prompts == PROMPTS


def test_nobody_is_asked_before_every_policy_model_has_a_rating(home: Path, server: EndpointServer):
    given = sources(home, server)
    unknown = PolicyModel(name="skyy", backend=backend(server, "sky"))
    sampling = given["sampling"].model_copy(update={"policy_models": (*given["sampling"].policy_models, unknown)})
    with pytest.raises(RatingsError, match=r"'skyy' has no rating.*nearest names: sky"):
        audit(AuditRun(judge=JudgeConfig(backend=backend(server, "judge")), **(given | {"sampling": sampling})))
    assert not server.asked


def test_a_missing_secret_names_itself_before_anybody_is_asked(
    home: Path, server: EndpointServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("CANARY_KEY")
    with pytest.raises(ConfigError, match="there is no secret 'CANARY_KEY'"):
        audit(AuditRun(judge=JudgeConfig(backend=backend(server, "judge")), **sources(home, server)))
    assert not server.asked


def test_a_policy_model_named_twice(home: Path, server: EndpointServer):
    given = sources(home, server)["sampling"]
    with pytest.raises(ValidationError, match=r"\['sand', 'sea', 'sky'\] more than once"):
        SamplingConfig(prompts=given.prompts, policy_models=given.policy_models * 2)


def test_settings_that_do_not_go_together(home: Path, server: EndpointServer):
    given = sources(home, server)
    judge = JudgeConfig(backend=backend(server, "judge"))
    scorer = RemoteScorerConfig(endpoint=Endpoint(base_url=server.url, model="rm"), route="vllm_score")
    with pytest.raises(ValidationError, match="exactly one of reward_model, scorer, judge"):
        AuditRun(judge=judge, scorer=scorer, **given)
    with pytest.raises(ValidationError, match="exactly one of reward_model, scorer, judge"):
        AuditRun(**given)
    with pytest.raises(ValidationError, match="leaves no use for"):
        AuditRun(judge=judge, arena=given["arena"], scores={"source": "x"})
    with pytest.raises(ValidationError, match="responses or sampling, not both"):
        CalibrationRun(
            arena=given["arena"], sampling=given["sampling"], responses={"source": "x"}, reward_model={"path": "x"}
        )


def test_replayed_files_are_read_before_anybody_is_asked(home: Path, server: EndpointServer):
    given = sources(home, server)
    missing = PolicyModel(name="sea", backend=ReplayBackend(source=str(home / "none.json")))
    live = given["sampling"].policy_models[0]
    sampling = given["sampling"].model_copy(update={"policy_models": (live, missing)})
    with pytest.raises(ConfigError, match=r"none\.json"):
        audit(AuditRun(judge=JudgeConfig(backend=backend(server, "judge")), **(given | {"sampling": sampling})))
    assert not server.asked
