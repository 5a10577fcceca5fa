"""What a training is told about the scores that its pairs are built from."""

import pytest

from charm_core.reward_model.jobs import ScoringSummary
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from flows import calibrate as calibrate_flow
from flows.calibration import knowing_scores
from flows.presets import CALIBRATE
from tasks.scoring import Scored
from tasks.store import ArtifactRef


def scored(drift: float | None) -> Scored:
    summary = ScoringSummary(
        texts=4, distinct_texts=4, tokens=40, padding_share=0.0, batch_drift=drift, max_length=64, longest_text=10, prompts_cut=0,
        responses_cut=0, empty_responses=0, tie_rate=0.0, smallest_gap=0.1,
    )  # fmt: skip
    return Scored(scores=ArtifactRef(kind="scores", digest="0" * 64, uri="scores", size=1), summary=summary)


@pytest.mark.parametrize(
    ("training", "model", "drift", "told"),
    [
        ({}, {}, 2e-7, "this_model"),
        ({"dtype": "float32"}, {}, 2e-7, "this_model"),
        ({"dtype": "float32"}, {"dtype": "float32", "strict": True}, 0.0, "this_model"),
        ({"dtype": "float32"}, {"dtype": "float32"}, None, "this_model"),
        # bfloat16, here or where the scores were made
        ({}, {}, 0.02, "unknown"),
        ({"dtype": "bfloat16"}, {}, 2e-7, "unknown"),
        ({"dtype": "float32"}, {}, 0.02, "unknown"),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, 0.0, "unknown"),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}, 0.0, "unknown"),
        ({}, {"dtype": "float32"}, 2e-7, "unknown"),  # training is in bfloat16 on a GPU
        # nothing to tell it by
        ({}, {"strict": True}, 0.0, "unknown"),
        ({}, {}, None, "unknown"),
        # as set
        ({"raw_scores_of": "another_model"}, {}, 2e-7, "another_model"),
        ({"raw_scores_of": "this_model"}, {}, 0.02, "this_model"),
    ],
)
def test_scores_of_the_model_itself_are_known_where_arithmetic_is_exact(training, model, drift, told):
    given = TrainingConfig(**training)
    found = knowing_scores(given, RewardModelSpec(path="rm", **model), scored(drift))
    assert found.raw_scores_of == told
    assert found.identity() == given.identity()  # a finished training is reused


def test_both_trainings_are_told(monkeypatch: pytest.MonkeyPatch):
    told = {}
    monkeypatch.setattr(
        calibrate_flow, "train_reward_model", lambda name, *given: told.update({name: given[-1].raw_scores_of})
    )
    monkeypatch.setattr(calibrate_flow, "rate_by_scores", lambda _: None)
    monkeypatch.setattr(calibrate_flow, "log_training", lambda *_: None)

    class Anything:
        """Sources and a correction, of which only the reward model's settings matter."""

        spec = RewardModelSpec(path="rm")

        def __getattr__(self, _: str) -> "Anything":
            return self

    calibrate_flow._fine_tune(Anything(), CALIBRATE["demo"](), Anything(), scored(2e-7), Anything())
    assert told == {"calibrated": "this_model", "control": "this_model"}
