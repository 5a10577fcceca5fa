"""The network is away in the middle of sampling, and comes back: before the client gives up, or after that."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from charm_core.errors import ServiceError
from tasks.caching import use_store
from tasks.store import ArtifactStore
from tests.endpoint_server import Asked, EndpointServer, Reply
from tests.tasks.test_sampling import good, policy_model, run, texts, write_prompts

pytestmark = pytest.mark.usefixtures("prefect_session")
PROMPTS = range(120)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with use_store(ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))) as store:
        yield store


class Cable(EndpointServer):
    """A server whose port is closed after so many answers."""

    def __init__(self, after: int, port: int = 0) -> None:
        super().__init__(self._behaviour, latency=0.01, port=port)
        self.pulled = threading.Event()
        self._after = after

    def _behaviour(self, asked: Asked) -> Reply | None:
        if asked.number >= self._after:
            self.pulled.set()
            return Reply(cut="unanswered")
        return None


def test_it_comes_back_soon(store: ArtifactStore):
    prompts = write_prompts(store, PROMPTS)
    before = Cable(50).__enter__()
    after = EndpointServer(port=before.port)

    def reconnect() -> None:
        before.pulled.wait(60)
        before.__exit__()
        after.__enter__()

    thread = threading.Thread(target=reconnect)
    thread.start()
    try:
        (sampled,) = run(prompts, policy_model(before, max_tries=8))
    finally:
        before.pulled.set()
        thread.join()
        after.__exit__()
    assert texts(store, sampled) == good(PROMPTS)
    assert before.answered + after.answered == dict.fromkeys((f"question {n}" for n in PROMPTS), 1)


def test_it_comes_back_later(store: ArtifactStore):
    prompts = write_prompts(store, PROMPTS)
    with Cable(50) as before:
        model = policy_model(before, max_tries=2)
        with pytest.raises(ServiceError, match="does not answer"):
            run(prompts, model)
    with EndpointServer(port=before.port) as after:
        (sampled,) = run(prompts, model)
    assert texts(store, sampled) == good(PROMPTS)
    # nothing that was answered is asked for again
    assert before.answered + after.answered == dict.fromkeys((f"question {n}" for n in PROMPTS), 1)
