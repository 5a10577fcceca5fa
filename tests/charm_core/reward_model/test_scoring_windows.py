"""Scoring holds only a window of the texts as tokens, and renders the next one beside the model."""

import threading
import time

import numpy as np
import pytest

from charm_core.reward_model import scoring
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec
from tests.charm_core.reward_model.tiny import prompts_and_responses, save_model

WINDOW = 7
SECONDS = 20


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return RewardModelSpec(path=str(save_model(tmp_path_factory.mktemp("model") / "rm")))


def test_scores_do_not_depend_on_the_window(spec, monkeypatch):
    tables = prompts_and_responses(9)
    whole = score_responses(spec, *tables)
    calls = []
    monkeypatch.setattr(scoring, "WINDOW_TEXTS", WINDOW)
    parts = score_responses(spec, *tables, lambda *now: calls.append(now))
    assert parts.scores.drop("score").equals(whole.scores.drop("score"))
    np.testing.assert_allclose(parts.scores["score"], whole.scores["score"], atol=1e-5)
    assert parts.cuts.equals(whole.cuts)
    assert parts.summary.tokens == whole.summary.tokens
    assert calls[-1] == (27, 27)


def test_the_next_window_is_rendered_while_one_is_scored(spec, monkeypatch):
    """Each scoring waits until texts of the window after it have been rendered, which no other order would allow."""
    monkeypatch.setattr(scoring, "WINDOW_TEXTS", WINDOW)
    rendered, threads = [], set()
    render, run_texts = scoring.render, scoring.run_texts
    scored, waited = [0], []

    def noted(*arguments):
        threads.add(threading.current_thread().name)
        rendered.append(1)
        return render(*arguments)

    def late(model, texts, *more):
        scored[0] += len(texts)
        end = time.monotonic() + SECONDS
        while len(rendered) <= scored[0] < 27 and time.monotonic() < end:
            time.sleep(0.01)
        waited.append(len(rendered) > scored[0])
        return run_texts(model, texts, *more)

    monkeypatch.setattr(scoring, "render", noted)
    monkeypatch.setattr(scoring, "run_texts", late)
    score_responses(spec, *prompts_and_responses(9))
    assert waited == [True, True, True, True, False]
    assert all(name.startswith("render") for name in threads)
