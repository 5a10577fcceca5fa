"""Every prompt answered exactly once, whatever the server does and whenever the run is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect import flow

from charm_core.errors import ConfigError, SamplingError, ServiceError
from charm_core.sampling import Decoding
from charm_core.tables import PROMPTS, SAMPLES
from tasks.answering.policy_model_refs import identify_policy_model
from tasks.caching import use_store
from tasks.policy_models import OpenAIBackend, PolicyModel, ReplayBackend, TransformersBackend
from tasks.sampling import SampledModel, sample_policy_models, sample_shard
from tasks.secrets import use_secrets
from tasks.store import ArtifactRef, ArtifactStore
from tests.endpoint_server import Asked, EndpointServer, Reply, completion, failure

pytestmark = pytest.mark.usefixtures("prefect_session")

ROOT = Path(__file__).parents[2]
DECODING = Decoding(max_tokens=32)
CANARY = "sk-canary-0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with use_store(ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))) as store:
        yield store


def write_prompts(store: ArtifactStore, numbers: Any, text: str = "question") -> ArtifactRef:
    rows = [
        {"prompt_id": f"p{n}", "prompt_set": "chat", "messages": [{"role": "user", "content": f"{text} {n}"}]}
        for n in numbers
    ]
    return store.write_table(pl.DataFrame(rows, schema=dict(PROMPTS.columns)), PROMPTS)


def policy_model(server: EndpointServer, name: str = "alpha", **options: Any) -> PolicyModel:
    settings = {"concurrency": 8, "timeout_seconds": 20.0, "model": "tiny", "deployment": "tiny@1"} | options
    return PolicyModel(name=name, backend=OpenAIBackend(base_url=server.url, **settings))


@flow
def sample(
    prompts: ArtifactRef, models: list[PolicyModel], shard_prompts: int, max_failed_share: float, decoding: Decoding
) -> list[SampledModel]:
    return list(sample_policy_models(prompts, models, decoding, shard_prompts, max_failed_share=max_failed_share))


def run(
    prompts: ArtifactRef,
    *models: PolicyModel,
    shard_prompts: int = 25,
    max_failed_share: float = 0.02,
    decoding: Decoding = DECODING,
) -> list[SampledModel]:
    return sample(prompts, list(models), shard_prompts, max_failed_share, decoding)


def texts(store: ArtifactStore, sampled: SampledModel) -> dict[str, str]:
    return dict(store.read_table(sampled.samples, SAMPLES).select("prompt_id", "response").iter_rows())


def good(numbers: Any) -> dict[str, str]:
    return {f"p{n}": f"answer to question {n}" for n in numbers}


def journals(store: ArtifactStore) -> list[str]:
    folder = Path(store.work_folder, "sampling")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


class TestOneRun:
    def test_every_prompt_is_asked_once_and_its_answer_stored(self, store: ArtifactStore):
        with EndpointServer() as server:
            (sampled,) = run(write_prompts(store, range(50)), policy_model(server))
        assert texts(store, sampled) == good(range(50))
        assert server.times() == Counter({f"question {n}": 1 for n in range(50)})
        assert (sampled.counts.prompts, sampled.counts.complete, sampled.asked) == (50, 50, 50)
        assert (sampled.counts.prompt_tokens, sampled.counts.response_tokens) == (250, 200)
        assert sampled.seconds is not None
        assert sampled.decoding == DECODING
        assert (sampled.served_as, sampled.warnings, sampled.reasons) == (("tiny",), (), ())
        assert journals(store) == []

    def test_models_are_asked_side_by_side_each_with_its_decoding(self, store: ArtifactStore):
        greedy = Decoding(sampling_temperature=0.0, max_tokens=5, system_prompt="Be brief.")
        with EndpointServer(latency=0.05) as slow, EndpointServer() as quick:
            models = [policy_model(slow), policy_model(quick, "beta").model_copy(update={"decoding": greedy})]
            alpha, beta = run(write_prompts(store, range(30)), *models, shard_prompts=100)
        assert (alpha.name, beta.name) == ("alpha", "beta")
        assert (alpha.decoding, beta.decoding) == (DECODING, greedy)
        assert {asked.body["temperature"] for asked in slow.asked} == {0.7}
        assert {(asked.body["temperature"], asked.body["messages"][0]["role"]) for asked in quick.asked} == {
            (0.0, "system")
        }
        assert quick.latest < slow.latest
        assert set(store.read_table(beta.samples, SAMPLES)["policy_model"]) == {"beta"}

    def test_how_answers_ended_is_counted_and_nothing_is_dropped(self, store: ArtifactStore):
        replies = {
            "question 0": Reply(completion("half", finish_reason="length")),
            "question 1": Reply(completion("")),
            "question 2": Reply(completion("I'm sorry, but I can't help with that.")),
            "question 3": failure(400, "filtered", code="content_filter"),
            "question 4": failure(400, "too long"),
        }
        with EndpointServer(lambda asked: replies.get(asked.prompt)) as server:
            (sampled,) = run(write_prompts(store, range(10)), policy_model(server), max_failed_share=0.1)
        counts = sampled.counts
        assert (counts.prompts, counts.complete, counts.truncated, counts.empty) == (10, 5, 1, 1)
        assert (counts.refused, counts.failed) == (2, 1)
        assert sampled.reasons == ("400: too long (1 times)",)
        assert len(texts(store, sampled)) == 10

    def test_another_model_than_asked_for_is_said(self, store: ArtifactStore):
        dated = Reply(completion("x", model="tiny-2026-01-01"))
        with EndpointServer(lambda asked: dated if asked.prompt == "question 3" else None) as server:
            (sampled,) = run(write_prompts(store, range(10)), policy_model(server))
            (again,) = run(write_prompts(store, range(10)), policy_model(server), shard_prompts=3)
        assert again.asked == 0
        assert "tiny-2026-01-01" in again.warnings[0]
        assert sampled.served_as == ("tiny", "tiny-2026-01-01")
        assert (
            "asked for as 'tiny', and the server says that it was answered by 'tiny', 'tiny-2026-01-01'"
            in sampled.warnings[0]
        )

    def test_costs_are_estimated_from_the_tokens(self, store: ArtifactStore):
        prices = {"cost_per_million_prompt_tokens": 2.0, "cost_per_million_response_tokens": 10.0}
        with EndpointServer() as server:
            (sampled,) = run(write_prompts(store, range(10)), policy_model(server, **prices))
            (again,) = run(write_prompts(store, range(10)), policy_model(server, **prices))
            (free,) = run(write_prompts(store, range(10)), policy_model(server))
        assert sampled.cost == pytest.approx((50 * 2.0 + 40 * 10.0) / 1e6)
        assert (again.cost, again.asked, again.seconds) == (sampled.cost, 0, None)
        assert free.cost is None

    def test_the_order_of_the_answers_does_not_matter(self, store: ArtifactStore, tmp_path: Path):
        digests = []
        for slow in (0, 1):
            other = ArtifactStore(url=str(tmp_path / f"store{slow}"), work_folder=str(tmp_path / f"work{slow}"))
            with (
                use_store(other),
                EndpointServer(lambda asked, slow=slow: self.late(slow, asked)) as server,
            ):
                (sampled,) = run(write_prompts(other, range(16)), policy_model(server))
                digests.append((sampled.samples.digest, list(server.answered)))
        assert digests[0][0] == digests[1][0]
        assert digests[0][1] != digests[1][1]

    @staticmethod
    def late(slow: int, asked: Asked) -> Reply:
        """Every other question is answered late, so that its neighbours overtake it."""
        late = int(asked.prompt.split()[-1]) % 2 == slow
        return Reply(completion(f"answer to {asked.prompt}"), wait=0.3 if late else 0.0)

    def test_a_terminal_sees_bars_and_nobody_else_does(
        self, store: ArtifactStore, capfd: pytest.CaptureFixture[str], monkeypatch
    ):
        with EndpointServer() as server:
            run(write_prompts(store, range(10)), policy_model(server))
            assert "answers/s" not in capfd.readouterr().err
            monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
            run(write_prompts(store, range(10, 20)), policy_model(server))
        shown = capfd.readouterr().err
        assert "alpha" in shown
        assert "10/10" in shown
        assert "tokens/s" in shown

    def test_a_missing_key_is_found_before_anybody_is_asked_and_not_needed_for_what_is_known(
        self, store: ArtifactStore
    ):
        prompts = write_prompts(store, range(10))
        with EndpointServer(latency=0.05) as server:
            models = [policy_model(server), policy_model(server, "beta", api_key="THE_KEY")]
            with pytest.raises(ConfigError, match="there is no secret 'THE_KEY'"):
                run(prompts, *models)
            assert server.asked == []
            with use_secrets({"THE_KEY": CANARY}.get):
                first = run(prompts, *models)
            assert run(prompts, *models)[1].samples == first[1].samples

    def test_settings_that_make_no_sense(self, store: ArtifactStore):
        with EndpointServer() as server:
            prompts, one = write_prompts(store, range(3)), policy_model(server)
            with pytest.raises(ConfigError, match=r"\['alpha'\] are named more than once"):
                run(prompts, one, one)
            replay = PolicyModel(name="r", backend=ReplayBackend(source="x.json"))
            with pytest.raises(ConfigError, match="'r' replays responses"):
                run(prompts, replay)
            absent = PolicyModel(name="t", backend=TransformersBackend(path="./absent"))
            with pytest.raises(ConfigError, match=r"there is no folder './absent' of the policy model 't'"):
                run(prompts, absent)
            floating = PolicyModel(name="t", backend=TransformersBackend(path="org/model", revision="main"))
            with pytest.raises(ConfigError, match=r"set backend.revision to the commit hash.*not 'main'"):
                run(prompts, floating)
        assert server.asked == []


def test_prefect_shows_how_far_it_is(store: ArtifactStore):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with EndpointServer() as server:
        run(write_prompts(store, range(10)), policy_model(server, "Gamma 3"))
    with get_client(sync_client=True) as client:
        shown = ArtifactFilter(key=ArtifactFilterKey(any_=["sampling-gamma-3"]))
        (artifact,) = client.read_artifacts(artifact_filter=shown)
    assert (artifact.type, artifact.data) == ("progress", 100.0)


class TestKeys:
    """What is the same question, and what is another one."""

    PROMPTS = ArtifactRef(kind="prompts", digest="ab" * 32, uri="/a", rows=3, size=9)

    def key(self, decoding: Decoding = DECODING, name: str = "alpha", **settings: Any) -> str:
        backend = OpenAIBackend(**{"base_url": "http://127.0.0.1:1/v1", "model": "tiny", **settings})
        ref = identify_policy_model(PolicyModel(name=name, backend=backend, decoding=Decoding(seed=7)))
        return sample_shard.key(self.PROMPTS, ref, decoding)

    @pytest.mark.parametrize(
        "settings",
        [
            {"concurrency": 3},
            {"timeout_seconds": 5.0},
            {"max_tries": 2},
            {"cost_per_million_prompt_tokens": 1.0},
            {"api_key": "ANOTHER"},
            {"token_limit": "max_completion_tokens"},
            {"base_url": "http://127.0.0.1:1/v1/"},
        ],
    )
    def test_how_fast_and_at_what_price_does_not_matter(self, settings: dict[str, Any]):
        assert self.key(**settings) == self.key()

    @pytest.mark.parametrize(
        "settings",
        [
            {"model": "other"},
            {"base_url": "http://127.0.0.1:2/v1"},
            {"deployment": "tiny@1"},
            {"leave_out": ("seed",)},
            {"extra_body": {"top_k": 5}},
            {"name": "beta"},
            {"decoding": Decoding(max_tokens=31)},
            {"decoding": Decoding(max_tokens=32, sampling_temperature=0.5)},
            {"decoding": Decoding(max_tokens=32, top_p=0.5)},
            {"decoding": Decoding(max_tokens=32, seed=1)},
            {"decoding": Decoding(max_tokens=32, seed=None)},
            {"decoding": Decoding(max_tokens=32, system_prompt="x")},
            {"decoding": Decoding(max_tokens=32, stop=("y",))},
        ],
    )
    def test_what_decides_the_answers_does(self, settings: dict[str, Any]):
        assert self.key(**settings) != self.key()

    def test_a_local_model_is_its_weights_however_it_is_run(self, tmp_path: Path):
        def key(path: Path, **settings: Any) -> str:
            backend = TransformersBackend(path=str(path), **settings)
            return sample_shard.key(
                self.PROMPTS, identify_policy_model(PolicyModel(name="t", backend=backend)), DECODING
            )

        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        assert key(tmp_path / "one") == key(tmp_path / "other") == key(tmp_path / "one", batch_size=3)
        assert key(tmp_path / "one") != key(tmp_path / "one", dtype="float32")
        before = key(tmp_path / "one")
        (tmp_path / "one" / "model.safetensors").write_bytes(b"others")
        assert key(tmp_path / "one") != before


class TestWhatIsKnown:
    """Nothing is asked twice."""

    def asked_anew(self, server: EndpointServer, again: Callable[[], Any]) -> set[str]:
        before = len(server.asked)
        again()
        return {asked.prompt for asked in server.asked[before:]}

    def test_the_same_again(self, store: ArtifactStore):
        with EndpointServer() as server:
            first = run(write_prompts(store, range(50)), policy_model(server))
            assert (
                self.asked_anew(
                    server, lambda: first.extend(run(write_prompts(store, range(50)), policy_model(server)))
                )
                == set()
            )
        assert first[0].samples == first[1].samples

    def test_the_deployment_at_another_address(self, store: ArtifactStore):
        prompts = write_prompts(store, range(20))
        with EndpointServer() as here, EndpointServer() as there:
            run(prompts, policy_model(here))
            run(prompts, policy_model(there))
            assert there.asked == []
            run(prompts, policy_model(there, deployment=None))
            assert len(there.asked) == 20
            run(prompts, policy_model(there), decoding=Decoding(max_tokens=31))
            assert len(there.asked) == 40

    def test_more_prompts_ask_for_the_new_ones_only(self, store: ArtifactStore):
        with EndpointServer() as server:
            run(write_prompts(store, range(40)), policy_model(server))
            more = self.asked_anew(server, lambda: run(write_prompts(store, range(43)), policy_model(server)))
            assert more == {"question 40", "question 41", "question 42"}
            # and twice as many shards
            more = self.asked_anew(server, lambda: run(write_prompts(store, range(60)), policy_model(server)))
            assert more == {f"question {n}" for n in range(43, 60)}
            assert (
                self.asked_anew(server, lambda: run(write_prompts(store, range(5, 30)), policy_model(server))) == set()
            )

    def test_another_size_of_shards_asks_for_nothing(self, store: ArtifactStore):
        prompts, found = write_prompts(store, range(40)), []
        with EndpointServer() as server:
            found += run(prompts, policy_model(server))
            assert (
                self.asked_anew(server, lambda: found.extend(run(prompts, policy_model(server), shard_prompts=7)))
                == set()
            )
        assert found[0].samples == found[1].samples

    def test_a_prompt_with_another_text_is_another_prompt(self, store: ArtifactStore):
        with EndpointServer() as server:
            run(write_prompts(store, range(20)), policy_model(server))
            same_ids = write_prompts(store, range(20), text="other question")
            assert len(self.asked_anew(server, lambda: run(same_ids, policy_model(server)))) == 20

    def test_a_lost_file_is_made_again_and_no_other(self, store: ArtifactStore):
        prompts, found = write_prompts(store, range(40)), []
        with EndpointServer() as server:
            found += run(prompts, policy_model(server))
            shards = sorted(Path(store.url, "samples").rglob("*.parquet"), key=lambda path: path.stat().st_size)
            shards[0].write_bytes(b"damaged")
            anew = self.asked_anew(server, lambda: found.extend(run(prompts, policy_model(server))))
        assert 0 < len(anew) < 20
        assert found[0].samples == found[1].samples


class TestFailures:
    def test_failed_requests_are_rows_and_the_next_run_asks_for_them_again(self, store: ArtifactStore):
        prompts = write_prompts(store, range(40))
        broken = {"question 7", "question 21"}
        with EndpointServer(lambda asked: failure(400, "too long") if asked.prompt in broken else None) as server:
            (sampled,) = run(prompts, policy_model(server), max_failed_share=0.05)
            assert (sampled.counts.complete, sampled.counts.failed) == (38, 2)
            samples = store.read_table(sampled.samples, SAMPLES)
            assert set(samples.filter(pl.col("status") == "failed")["prompt_id"]) == {"p7", "p21"}
            first = len(server.asked)
            (same,) = run(prompts, policy_model(server), max_failed_share=0.05)
            assert same.samples == sampled.samples
            assert {asked.prompt for asked in server.asked[first:]} == broken
            broken.clear()
            second = len(server.asked)
            (mended,) = run(prompts, policy_model(server))
            assert len(server.asked) == second + 2
        assert texts(store, mended) == good(range(40))
        assert mended.counts.failed == 0
        assert journals(store) == []

    def test_too_many_are_an_error_that_says_why_and_keeps_the_rest(self, store: ArtifactStore):
        prompts = write_prompts(store, range(100))
        down = [True]

        def behaviour(asked: Asked) -> Reply | None:
            return failure(422, "no such field 'seed'") if down[0] and asked.number % 10 == 3 else None

        with EndpointServer(behaviour) as server:
            with pytest.raises(
                SamplingError, match=r"3 of \d+ requests to 'alpha' failed.*allows 2: 422: no such field 'seed' \(3\)"
            ):
                run(prompts, policy_model(server))
            kept = sum(server.answered.values())
            down[0] = False
            (sampled,) = run(prompts, policy_model(server))
        assert 100 - kept <= sampled.asked <= 100 - kept + 8  # those under way when it stopped
        assert texts(store, sampled) == good(range(100))

    def test_a_server_that_goes_down_loses_nothing(self, store: ArtifactStore):
        prompts, up = write_prompts(store, range(100)), [True]

        def behaviour(asked: Asked) -> Reply | None:
            if asked.number >= 60:
                up[0] = up[0] and asked.number != 60
            return None if up[0] else Reply(cut="unanswered")

        with EndpointServer(behaviour) as server:
            with pytest.raises(ServiceError, match="does not answer"):
                run(prompts, policy_model(server, max_tries=2))
            server.behaviour = lambda asked: None
            (sampled,) = run(prompts, policy_model(server))
        assert texts(store, sampled) == good(range(100))
        assert set(server.answered.values()) == {1}

    def test_one_that_goes_wrong_stops_the_others_and_keeps_their_answers(self, store: ArtifactStore):
        prompts = write_prompts(store, range(200))
        rejected = lambda asked: failure(404, "no such model") if asked.number > 10 else None  # noqa: E731
        with EndpointServer(latency=0.05) as slow, EndpointServer(rejected) as wrong:
            with pytest.raises(ConfigError, match="no such model"):
                run(prompts, policy_model(slow), policy_model(wrong, "beta"))
            kept, asked = sum(slow.answered.values()), len(slow.asked)
            assert asked < 200
            slow.latency = 0.0
            (sampled,) = run(prompts, policy_model(slow))
        assert 200 - asked <= sampled.asked <= 200 - kept + 8
        assert texts(store, sampled) == good(range(200))


SCRIPT = """
import sys
from pathlib import Path
from prefect import flow
from charm_core.sampling import Decoding
from tasks.caching import use_store
from tasks.policy_models import PolicyModel
from tasks.sampling import sample_responses
from tasks.store import ArtifactRef, ArtifactStore

store, prompts, model = (Path(name).read_text() for name in sys.argv[1:4])

@flow
def sample():
    sample_responses(
        ArtifactRef.model_validate_json(prompts), PolicyModel.model_validate_json(model), Decoding(max_tokens=32), 100
    )

with use_store(ArtifactStore.model_validate_json(store)):
    sample()
"""


class TestInterruptions:
    def start(
        self, tmp_path: Path, store: ArtifactStore, prompts: ArtifactRef, model: PolicyModel
    ) -> subprocess.Popen[bytes]:
        """A process of its own that samples, against the Prefect server of these tests."""
        from prefect.settings import PREFECT_API_URL

        files = []
        for name, value in (("store", store), ("prompts", prompts), ("model", model)):
            files.append(str(tmp_path / f"{name}.json"))
            Path(files[-1]).write_text(value.model_dump_json())
        environment = {
            **os.environ,
            "PREFECT_API_URL": PREFECT_API_URL.value() or "",
            "PREFECT_LOGGING_TO_API_ENABLED": "false",
        }
        return subprocess.Popen([sys.executable, "-c", SCRIPT, *files], cwd=ROOT, env=environment)

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
    def test_a_killed_run_goes_on_with_what_is_missing(self, store: ArtifactStore, tmp_path: Path, how: signal.Signals):
        prompts = write_prompts(store, range(400))
        with EndpointServer(latency=0.05) as server:
            process = self.start(tmp_path, store, prompts, policy_model(server))
            try:
                while process.poll() is None and len(server.asked) < 250:
                    time.sleep(0.01)
                assert process.poll() is None
                os.kill(process.pid, how)
                assert process.wait(timeout=30) != 0
            finally:
                process.kill()
                process.wait()
            at_kill = len(server.asked)
            (sampled,) = run(prompts, policy_model(server), shard_prompts=100)
            twice = [prompt for prompt, times in server.times().items() if times > 1]
        assert 250 <= at_kill < 400
        assert len(twice) <= 8  # the concurrency: those that were under way
        assert sampled.asked <= 400 - at_kill + 8
        assert texts(store, sampled) == good(range(400))

    def test_two_runs_at_once_ask_for_nothing_twice(self, store: ArtifactStore, tmp_path: Path):
        prompts = write_prompts(store, range(120))
        with EndpointServer(latency=0.05) as server:
            model = policy_model(server)
            process = self.start(tmp_path, store, prompts, model)
            try:
                while process.poll() is None and len(server.asked) < 20:
                    time.sleep(0.01)
                (sampled,) = run(prompts, model, shard_prompts=100)
                assert process.wait(timeout=60) == 0
            finally:
                process.kill()
                process.wait()
        assert set(server.times().values()) == {1}
        assert texts(store, sampled) == good(range(120))
        assert sampled.asked == 0
        assert journals(store) == []

    def test_half_a_line_is_asked_again_and_spoils_nothing(self, store: ArtifactStore):
        prompts = write_prompts(store, range(30))
        with EndpointServer(lambda asked: failure(404, "stop") if asked.number == 20 else None) as server:
            with pytest.raises(ConfigError):
                run(prompts, policy_model(server, concurrency=1), shard_prompts=100)
            (journal,) = Path(store.work_folder, "sampling").glob("*.jsonl")
            lines = journal.read_bytes().splitlines(keepends=True)
            assert len(lines) == 20
            journal.write_bytes(b"".join(lines[:15]) + b"\0\0\0\n" + b"".join(lines[16:19]) + lines[19][:30])
            server.behaviour = lambda asked: None
            (sampled,) = run(prompts, policy_model(server), shard_prompts=100)
        assert sampled.asked == 30 - 18
        assert texts(store, sampled) == good(range(30))

    def test_a_complete_journal_is_stored_without_asking(self, store: ArtifactStore, monkeypatch):
        prompts = write_prompts(store, range(30))
        with EndpointServer() as server:
            with monkeypatch.context() as broken:
                broken.setattr("tasks.sampling.samples_table", lambda *_: 1 / 0)  # as if killed before it is stored
                with pytest.raises(ZeroDivisionError):
                    run(prompts, policy_model(server), shard_prompts=100)
            (sampled,) = run(prompts, policy_model(server), shard_prompts=100)
        assert len(server.asked) == 30
        assert (sampled.asked, texts(store, sampled)) == (0, good(range(30)))


class TestHardship:
    """A thousand prompts, 64 at a time, at a server that does everything wrong that it can."""

    @staticmethod
    def behaviour(asked: Asked) -> Reply | None:
        if not asked.body:
            return None
        drawn = random.Random(f"{asked.prompt} {asked.time}").random()
        answer = f"answer to {asked.prompt}"
        faults: list[tuple[float, Reply]] = [
            (0.02, failure(429, "slow down", retry_after="0.2")),
            (0.02, failure(429, "slow down")),
            (0.04, failure(500, "engine")),
            (0.04, Reply(cut="unanswered")),
            (0.04, Reply(completion(answer), cut="half")),
            (0.04, Reply(b'{"id": "chatcmpl-1", "choices": [{"message"')),
            (0.03, Reply({"id": "chatcmpl-1", "choices": []})),
            (0.03, Reply(b"<html>bad gateway</html>", 502, {"content-type": "text/html"})),
            (0.02, Reply(completion(answer), byte_wait=0.001)),
            (0.01, Reply(completion(answer), byte_wait=0.1)),  # never done within the time-out
            (0.05, Reply(completion(answer, model="another-model"))),
        ]
        for share, reply in faults:
            drawn -= share
            if drawn < 0:
                return reply
        return None

    def test_every_prompt_is_answered_exactly_once(self, store: ArtifactStore):
        prompts = write_prompts(store, range(1000))
        with EndpointServer(self.behaviour, latency=0.02) as server:
            model = policy_model(server, concurrency=64, timeout_seconds=2.0, max_tries=8)
            (sampled,) = run(prompts, model, shard_prompts=300, max_failed_share=0.0)
        assert texts(store, sampled) == good(range(1000))
        assert (sampled.counts.complete, sampled.asked) == (1000, 1000)
        assert 32 < server.peak <= 64
        assert len(server.asked) > 1200
        assert sampled.served_as == ("another-model", "tiny")
        # good answers that were cut by the time-out are not among these
        assert all(times >= 1 for times in server.answered.values())
        assert len(server.answered) == 1000


def test_the_key_is_in_no_file_log_or_error(
    store: ArtifactStore, caplog: pytest.LogCaptureFixture, capfd, tmp_path: Path
):
    caplog.set_level(0)

    def behaviour(asked: Asked) -> Reply | None:
        assert asked.headers["authorization"] == f"Bearer {CANARY}"
        if asked.prompt == "question 3":
            return failure(400, f"cannot with {asked.headers}", code=CANARY)
        return failure(500, f"oops {CANARY}") if asked.time == 0 and asked.number % 3 == 0 else None

    prompts = write_prompts(store, range(30))
    with use_secrets({"THE_KEY": CANARY}.get), EndpointServer(behaviour) as server:
        (sampled,) = run(prompts, policy_model(server, api_key="THE_KEY"), max_failed_share=0.1)
        server.behaviour = lambda asked: failure(401, f"wrong {CANARY}")
        with pytest.raises(ConfigError, match=r"wrong \[key\]") as caught:
            run(write_prompts(store, range(40)), policy_model(server, api_key="THE_KEY"))
    assert sampled.reasons[0].startswith("400: cannot with ")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"answer" in written
    shown = capfd.readouterr()
    for place in (
        written.decode(errors="replace"),
        caplog.text,
        shown.out,
        shown.err,
        repr(caught.value),
        str(sampled),
    ):
        assert CANARY not in place


def test_steps_and_journals_hold_plain_data(store: ArtifactStore):
    with (
        EndpointServer(lambda asked: failure(404, "stop") if asked.number == 5 else None) as server,
        pytest.raises(ConfigError),
    ):
        run(write_prompts(store, range(10)), policy_model(server, concurrency=1), shard_prompts=100)
    (journal,) = Path(store.work_folder, "sampling").glob("sample_shard-v1-*.jsonl")
    first = json.loads(journal.read_text().splitlines()[0])
    assert first.keys() == {
        "prompt_id",
        "response",
        "status",
        "finish_reason",
        "prompt_tokens",
        "response_tokens",
        "served_as",
    }
