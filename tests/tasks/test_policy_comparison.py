"""Policies compared where nothing is simulated; with a simulation's truth see test_post_training.py."""

from pathlib import Path

import polars as pl

from charm_core.policy_comparison import ComparisonConfig, PolicyComparison
from charm_core.simulated_reading import fresh_prompts
from charm_core.simulation import SimulationConfig
from charm_core.tables import PREFERENCES, PROMPTS, RESPONSES, SCORES
from tasks.policy_comparison import compare_answers, comparison_markdown, comparison_metrics, comparison_summary
from tasks.prompts import ResponseSet
from tasks.store import ArtifactStore


def test_a_judge_and_reward_models_have_their_say(tmp_path: Path):
    store = ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))
    prompts = fresh_prompts(SimulationConfig(), 2, "exam")
    ids = prompts.get_column("prompt_id").to_list()
    responses = pl.DataFrame(
        [(prompt, name, "x" * length) for prompt in ids for name, length in (("a", 2), ("b", 5))],
        schema=dict(RESPONSES.columns), orient="row",
    )  # fmt: skip
    answers = ResponseSet(
        prompts=store.write_table(prompts, PROMPTS),
        responses=store.write_table(responses, RESPONSES),
        policy_models=("a", "b"),
    )
    scores = responses.select("prompt_id", "policy_model", score=pl.lit(1.5))
    judged = pl.DataFrame({"prompt_id": ids, "model_a": ["a", "a"], "model_b": ["b", "b"], "preference_a": [1.0, 0.5]})
    ref = compare_answers.function(
        store,
        answers,
        ("a", "b"),
        (("a", "b"),),
        ComparisonConfig(bootstrap_replicates=10),
        None,
        (("base", store.write_table(scores, SCORES)),),
        (("judge/1", store.write_table(judged, PREFERENCES)),),
    )
    found = store.read_record(ref, PolicyComparison)
    assert {(mean.policy_model, mean.measure): mean.value.value for mean in found.means} == {
        ("a", "characters"): 2.0, ("b", "characters"): 5.0, ("a", "score of base"): 1.5, ("b", "score of base"): 1.5
    }  # fmt: skip
    assert [(win.judge, win.win_rate.value) for win in found.win_rates] == [("judge/1", 0.25)]
    assert comparison_metrics(found)["b over a/win rate by judge_1"] == 0.25
    assert "| a | 2.00 [2.00, 2.00] | 1.50 [1.50, 1.50] |" in comparison_markdown(found)
    assert "win rate by judge/1" in comparison_markdown(found)
    assert comparison_summary(found, "own", simulated=False)[1].strip().startswith("characters: a 2.00")
