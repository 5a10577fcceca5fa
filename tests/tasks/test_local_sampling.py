"""Policy models that run here: in a process of their own, behind our small server, and behind ``transformers serve``."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import polars as pl
import psutil
import pytest
from prefect import flow

from charm_core.errors import ConfigError, ModelError, SamplingError
from charm_core.reward_model.generation import generate_answers
from charm_core.reward_model.generation_job import PolicyModelSpec
from charm_core.sampling import Decoding, samples_table
from charm_core.tables import PROMPTS, SAMPLES
from tasks.caching import use_store
from tasks.policy_models import OpenAIBackend, PolicyModel, TransformersBackend, VllmBackend
from tasks.sampling import SampledModel, sample_policy_models
from tasks.store import ArtifactRef, ArtifactStore
from tests.endpoint_server import Asked, EndpointServer, Reply, failure, policy_model_server
from tests.tiny_policy_model import WORDS, save_policy_model

pytestmark = pytest.mark.usefixtures("prefect_session")

DECODING = Decoding(max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy_model(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def local_policy_model_server(folder: Path) -> Iterator[EndpointServer]:
    with policy_model_server(folder) as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with use_store(ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))) as store:
        yield store


def prompts_table(count: int) -> pl.DataFrame:
    rows = [
        {"prompt_id": f"p{n:04d}", "prompt_set": "words", "messages": [{"role": "user", "content": WORDS[n % 40]}]}
        for n in range(count)
    ]
    return pl.DataFrame(rows, schema=dict(PROMPTS.columns))


def local(folder: Path, name: str = "tiny", batch_size: int = 8) -> PolicyModel:
    backend = TransformersBackend(path=str(folder), dtype="float32", batch_size=batch_size)
    return PolicyModel(name=name, backend=backend)


def served(url: str, name: str = "tiny", model: str = "tiny") -> PolicyModel:
    return PolicyModel(name=name, backend=OpenAIBackend(base_url=url, model=model, concurrency=4, timeout_seconds=60))


@flow
def sample(prompts: ArtifactRef, models: list[PolicyModel], decoding: Decoding = DECODING) -> list[SampledModel]:
    return list(sample_policy_models(prompts, models, decoding, 50))


def workers() -> list[psutil.Process]:
    """Our children that answer prompts."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it may end while one looks
            if "charm_core.reward_model.worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


class TestInAProcessOfItsOwn:
    def test_the_answers_are_those_of_the_model(self, store: ArtifactStore, folder: Path, tmp_path: Path):
        prompts = prompts_table(60)
        (sampled,) = sample(store.write_table(prompts, PROMPTS), [local(folder)])
        spec = PolicyModelSpec(path=str(folder), dtype="float32")
        here = [answer for batch in generate_answers(spec, DECODING, prompts) for answer in batch]
        assert store.read_table(sampled.samples, SAMPLES).equals(samples_table("tiny", here))
        assert (sampled.asked, sampled.counts.prompts, sampled.counts.failed) == (60, 60, 0)
        assert (sampled.cost, sampled.served_as) == (None, ())
        # a model is its weights and not its place
        copy = save_policy_model(tmp_path / "copy")
        (again,) = sample(store.write_table(prompts, PROMPTS), [local(copy, batch_size=3)])
        assert (again.asked, again.samples) == (0, sampled.samples)

    def test_local_models_take_turns_beside_a_server(self, store: ArtifactStore, folder: Path, tmp_path: Path):
        other, most = save_policy_model(tmp_path / "other", seed=1), [0]
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                most[0] = max(most[0], len(workers()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        with EndpointServer() as server:
            models = [local(folder), local(other, "other"), served(server.url, "served")]
            results = sample(store.write_table(prompts_table(30), PROMPTS), models)
        done.set()
        watcher.join()
        assert [result.counts.prompts for result in results] == [30, 30, 30]
        assert results[0].samples != results[1].samples
        assert most == [1]

    def test_a_killed_worker_loses_its_batch_and_no_more(self, store: ArtifactStore, folder: Path):
        prompts, decoding = store.write_table(prompts_table(120), PROMPTS), Decoding(max_tokens=40)
        journals = Path(store.work_folder, "sampling")

        def written() -> int:
            return sum(path.read_bytes().count(b"\n") for path in journals.glob("*.jsonl")) if journals.exists() else 0

        def kill() -> None:
            while written() < 6:
                time.sleep(0.01)
            workers()[0].send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(SamplingError, match=r"what was answered is kept.*ended by signal 9"):
            sample(prompts, [local(folder, batch_size=3)], decoding)
        killer.join()
        kept = written()
        assert 6 <= kept < 120
        (sampled,) = sample(prompts, [local(folder)], decoding)
        assert (sampled.asked, sampled.counts.prompts) == (120 - kept, 120)

    def test_it_ends_when_another_policy_model_goes_wrong(self, store: ArtifactStore, folder: Path):
        prompts = store.write_table(prompts_table(400), PROMPTS)

        def behaviour(asked: Asked) -> Reply:
            while not workers():
                time.sleep(0.05)
            return failure(404, "no such model")

        with EndpointServer(behaviour) as server, pytest.raises(ConfigError, match="no such model"):
            sample(prompts, [local(folder), served(server.url, "served")], Decoding(max_tokens=200))
        assert workers() == []

    def test_what_is_wrong_with_the_model_arrives(self, store: ArtifactStore, tmp_path: Path):
        empty = tmp_path / "empty"
        empty.mkdir()
        (empty / "config.json").write_text("{}")
        prompts = store.write_table(prompts_table(3), PROMPTS)
        with pytest.raises(ModelError, match=r"the policy model .* cannot be loaded"):
            sample(prompts, [local(empty)])

    @pytest.mark.skipif("vllm" in sys.modules, reason="vLLM is here")
    def test_without_vllm_the_error_says_what_to_do(self, store: ArtifactStore, folder: Path):
        prompts = store.write_table(prompts_table(3), PROMPTS)
        model = PolicyModel(name="v", backend=VllmBackend(path=str(folder)))
        with pytest.raises(
            ConfigError, match=r"the vllm back end needs vLLM.*or serve the model and use the openai back end"
        ):
            sample(prompts, [model])


class TestServed:
    def test_behind_our_small_server(
        self, store: ArtifactStore, folder: Path, local_policy_model_server: EndpointServer
    ):
        prompts = prompts_table(20)
        greedy = Decoding(sampling_temperature=0.0, max_tokens=12)
        (sampled,) = sample(store.write_table(prompts, PROMPTS), [served(local_policy_model_server.url)], greedy)
        spec = PolicyModelSpec(path=str(folder), dtype="float32")
        here = [answer for batch in generate_answers(spec, greedy, prompts) for answer in batch]
        assert store.read_table(sampled.samples, SAMPLES).equals(samples_table("tiny", here))

    def test_behind_transformers_serve(self, store: ArtifactStore, folder: Path, tmp_path: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (tmp_path / "hub").mkdir()  # its list of models is an error without one
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "OMP_NUM_THREADS": "1",
        }
        script = Path(sys.executable).with_name("transformers")
        command = [str(script), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                try:
                    httpx.get(f"{url}/health", timeout=1)
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            assert process.poll() is None, (tmp_path / "log").read_text()
            prompts = store.write_table(prompts_table(12), PROMPTS)
            (sampled,) = sample(prompts, [served(f"{url}/v1", model=str(folder))])
        finally:
            process.terminate()
            process.wait(timeout=20)
        assert (sampled.counts.prompts, sampled.counts.failed, sampled.asked) == (12, 0, 12)
        assert 0 < (sampled.counts.response_tokens or 0) <= 12 * 12
        assert sampled.served_as[0].startswith(str(folder))
