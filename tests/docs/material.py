"""What a reader of the pages has and the repository has not: leaderboards, responses, scores, a reward model. Small and made up."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from charm_core.bradley_terry import ratings_from_battles
from charm_core.reward_model.tiny import build_tiny_reward_model
from charm_core.simulation import SimulatedArena, SimulationConfig, simulate_arena

ANSWER = """import json, sys
words = json.load(sys.stdin)["messages"][-1]["content"].split()
print(json.dumps({"response": " ".join(words[: int(sys.argv[1])])}))
"""


def write_material(folder: Path) -> None:
    """All files that the pages name."""
    arena = simulate_arena(SimulationConfig(prompts=40, label_prompts=30, battles=2000))
    build_tiny_reward_model(arena.vocabulary, folder / "my-reward-model")
    writers: tuple[Callable[[SimulatedArena, Path], None], ...] = (_boards, _responses, _scores, _prompts, _house)
    for write in writers:
        write(arena, folder)


def _boards(arena: SimulatedArena, folder: Path) -> None:
    ratings = ratings_from_battles(arena.battles)
    extra = pl.DataFrame({"policy_model": ["policy-a", "policy-b"], "rating": [1050.0, 950.0]})
    columns = ["policy_model", "rating", "rating_low", "rating_high", "votes"]
    board = pl.concat([ratings.select(columns), extra], how="diagonal")
    board.write_csv(folder / "leaderboard.csv")
    rank = pl.col("rating").rank()  # far apart now, so that win probabilities have moved
    later = board.with_columns(rating=900 + 60 * rank, rating_low=895 + 60 * rank, rating_high=905 + 60 * rank)
    later.write_csv(folder / "leaderboard-later.csv")
    board.select(
        name="policy_model", elo="rating", elo_se=pl.lit(5.0), games=pl.lit(100)
    ).write_csv(folder / "ours.csv")  # fmt: skip


def _responses(arena: SimulatedArena, folder: Path) -> None:
    texts = arena.prompts.select("prompt_id", prompt=pl.col("messages").list.first().struct.field("content"))
    table = arena.responses.join(texts, on="prompt_id").rename({"policy_model": "model"})
    table.select("prompt", "model", "response").write_parquet(folder / "responses.parquet")


def _scores(arena: SimulatedArena, folder: Path) -> None:
    draws = np.random.default_rng(0).normal(size=arena.responses.height)
    table = arena.responses.select(id="prompt_id", model="policy_model").with_columns(reward=pl.Series(draws))
    table.write_parquet(folder / "scores.parquet")


def _prompts(arena: SimulatedArena, folder: Path) -> None:
    questions = [messages[0]["content"] for messages in arena.prompts["messages"].to_list()]
    (folder / "alpaca_eval.json").write_text(json.dumps([{"instruction": text} for text in questions]))
    (folder / "answer.py").write_text(ANSWER)


def _house(arena: SimulatedArena, folder: Path) -> None:
    texts = arena.responses["response"].to_list()
    rows = [
        {"id": number, "topic": "tone", "question": "Is it good?", "good": good, "bad": bad}
        for number, (good, bad) in enumerate(zip(texts[:10], texts[10:20], strict=True))
    ]
    (folder / "house.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
