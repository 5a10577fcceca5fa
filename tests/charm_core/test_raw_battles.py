"""Tables of votes as they are published: every outcome explained, nothing dropped without being counted."""

import polars as pl
import pytest

from charm_core.errors import CharmError, RatingsError, TableError
from charm_core.raw_battles import BattleTable, CovariateColumns, is_table_of_votes, read_battles, style_covariates


def votes(**columns: object) -> pl.DataFrame:
    return pl.DataFrame({"model_a": ["x", "y"], "model_b": ["y", "x"], "winner": ["model_a", "tie"]} | columns)


def counted(
    table: pl.DataFrame, config: BattleTable | None = None, responses: pl.DataFrame | None = None
) -> dict[str, object]:
    config = config or BattleTable()
    found = style_covariates(read_battles(table, config), config, responses)
    return {name: (a.tolist(), b.tolist()) for name, (a, b) in found.items()}


def test_the_arenas_own_columns() -> None:
    table = votes(winner=["model_b", "both_bad"])
    read = read_battles(table, BattleTable())
    assert read.battles.rows() == [(0, "x", "y", "model_b"), (1, "y", "x", "tie (bothbad)")]
    assert read.notes == ()


def test_other_names_and_words() -> None:
    table = pl.DataFrame({"left": ["x"], "right": ["y"], "vote": ["R"], "judge": ["crowd"]})
    config = BattleTable(model_a="left", model_b="right", winner="vote", outcomes={"R": "model_b"})
    assert is_table_of_votes(table.columns, config)
    assert read_battles(table, config).battles.row(0) == (0, "x", "y", "model_b")


def test_one_column_for_each_outcome() -> None:
    table = votes(winner_model_a=[1, 0], winner_model_b=[0, 0], winner_tie=[0, 1]).drop("winner")
    assert is_table_of_votes(table.columns, BattleTable())
    assert read_battles(table, BattleTable()).battles["winner"].to_list() == ["model_a", "tie"]
    with pytest.raises(TableError, match=r"exactly one"):
        read_battles(table.with_columns(winner_tie=pl.lit(0)), BattleTable())


def test_votes_with_names_in_sight_and_on_overused_prompts_are_left_out_and_counted() -> None:
    table = votes(anony=[True, False])
    read = read_battles(table, BattleTable())
    assert read.battles.height == 1
    assert read.notes == ("1 votes with the models' names in sight are left out",)
    assert read_battles(table, BattleTable(anonymous_only=False)).battles.height == 2
    tagged = votes(dedup_tag=[{"high_freq": True, "sampled": False}, {"high_freq": False, "sampled": True}])
    read = read_battles(tagged, BattleTable())
    assert (read.battles.height, read.notes) == (1, ("1 votes on over-represented prompts are left out",))
    assert read_battles(votes(anony=[True, True]), BattleTable()).notes == ()


def test_rows_are_chosen_by_text() -> None:
    assert read_battles(votes(turn=[1, 2]), BattleTable(where={"turn": "2"})).battles["model_a"].to_list() == ["y"]


@pytest.mark.parametrize(
    ("table", "config", "error", "message"),
    [
        (votes().drop("winner"), {}, RatingsError, r"needs the columns \['model_a', 'model_b', 'winner'\] but lacks \['winner'\]"),
        (votes(), {"where": {"judge": "crowd"}}, RatingsError, r"lacks \['judge'\]"),
        (votes(turn=[1, 2]), {"where": {"turn": "3"}}, RatingsError, r"no vote of 2 is left"),
        (votes(winner=["left", "tie"]), {}, TableError, r"outcomes \['left'\] are not known"),
        (votes(winner=[None, "tie"]), {}, TableError, r"1 votes have none"),
        (votes(model_a=[None, "y"]), {}, TableError, r"'model_a'.*nulls"),
    ],
)  # fmt: skip
def test_bad_tables(table: pl.DataFrame, config: dict[str, object], error: type[CharmError], message: str) -> None:
    with pytest.raises(error, match=message):
        read_battles(table, BattleTable.model_validate(config))


def test_style_from_named_columns() -> None:
    config = BattleTable(covariates=(CovariateColumns(name="length", a="tokens_a", b="tokens_b"),))
    assert counted(votes(tokens_a=[5, 6], tokens_b=[7, 8]), config) == {"length": ([5.0, 6.0], [7.0, 8.0])}
    with pytest.raises(RatingsError, match=r"columns \['tokens_a', 'tokens_b'\] are missing"):
        counted(votes(), config)
    with pytest.raises(TableError, match=r"'tokens_a' must be a number in every vote"):
        counted(votes(tokens_a=["5", "6"], tokens_b=[7, 8]), config)
    with pytest.raises(TableError, match=r"1 gaps"):
        counted(votes(tokens_a=[5, None], tokens_b=[7, 8]), config)


def test_style_from_the_arenas_metadata() -> None:
    metadata = {
        "sum_assistant_a_tokens": 10, "sum_assistant_b_tokens": 20,
        "header_count_a": {"h1": 1, "h2": 2}, "header_count_b": {"h1": 0, "h2": 0},
        "bold_count_a": {"**": 3, "__": None}, "bold_count_b": {"**": 0, "__": 1},
        "list_count_a": {"ordered": 1, "unordered": 4}, "list_count_b": {"ordered": 0, "unordered": 0},
    }  # fmt: skip
    found = counted(votes(conv_metadata=[metadata, metadata]))
    assert {name: (a[0], b[0]) for name, (a, b) in found.items()} == {
        "length": (10.0, 20.0), "headers": (3.0, 0.0), "bold": (3.0, 1.0), "lists": (5.0, 0.0),
    }  # fmt: skip


def test_style_from_texts_and_conversations() -> None:
    found = counted(votes(response_a=["# T\nab", "x"], response_b=["", "- y"]))
    assert found["length"] == ([6.0, 1.0], [0.0, 3.0])
    assert (found["headers"], found["lists"]) == (([1.0, 0.0], [0.0, 0.0]), ([0.0, 0.0], [0.0, 1.0]))
    said = [("user", "# long question"), ("assistant", "ab"), ("assistant", "# c")]
    talk = [{"role": role, "content": content} for role, content in said]
    found = counted(votes(conversation_a=[talk, talk], conversation_b=[talk[:2], talk[:2]]))
    assert (found["length"][0][0], found["headers"][0][0], found["length"][1][0]) == (6.0, 1.0, 2.0)


def test_style_from_a_file_with_the_responses() -> None:
    config = BattleTable(
        prompt_id="q", responses_prompt_id="prompt", responses_policy_model="name", responses_text="text"
    )
    answers = pl.DataFrame(
        {"prompt": ["1", "1", "2", "2"], "name": ["x", "y", "x", "y"], "text": ["a", "bb", "ccc", "dddd"]}
    )
    found = counted(votes(q=[1, 2]), config, answers)
    assert found["length"] == ([1.0, 4.0], [2.0, 3.0])
    with pytest.raises(TableError, match=r"1 votes lack a response, first that of 'y' to the prompt '1'"):
        counted(votes(q=[1, 2]), config, answers.filter(pl.col("text") != "bb"))
    with pytest.raises(TableError, match=r"'x' has several responses to the prompt '1'"):
        counted(votes(q=[1, 2]), config, pl.concat([answers, answers.head(1)]))


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({}, RatingsError, r"need the style of the responses.*set arena.style_control = false"),
        ({"response_a": ["x", None], "response_b": ["y", "z"]}, TableError, r"1 votes have no text"),
        ({"response_a": ['["x"]', '["y"]'], "response_b": ["y", "z"]}, TableError, r"are JSON lists; decode"),
        (
            {"response_a": [1, 2], "response_b": ["y", "z"]},
            TableError,
            r"must hold texts or lists of messages, not Int64",
        ),
    ],
)
def test_style_that_cannot_be_had(columns: dict[str, object], error: type[CharmError], message: str) -> None:
    with pytest.raises(error, match=message):
        counted(votes(**columns))
