"""Published tables to ours, and which prompts are held out."""

import math
import re
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charm_core.errors import ConfigError, TableError
from charm_core.responses import (
    CALIBRATION,
    HELD_OUT,
    HELD_OUT_DOMAIN,
    ColumnNames,
    SplitConfig,
    ingest_preferences,
    ingest_responses,
    ingest_scores,
    prompt_content_id,
    split_prompts,
)
from charm_core.tables import MESSAGES, PROMPTS

COLUMNS = ColumnNames()


def responses(**columns: object) -> pl.DataFrame:
    base: dict[str, object] = {
        "prompt_id": ["p1", "p1", "p2"],
        "prompt": ["Why?", "Why?", "How?"],
        "policy_model": ["a", "b", "a"],
        "response": ["because", "", "so"],
    }
    return pl.DataFrame(base | columns)


def scores(**columns: object) -> pl.DataFrame:
    return pl.DataFrame({"prompt_id": ["p1", "p2"], "policy_model": ["a", "a"], "score": [1.5, -2.0]} | columns)


def preferences(**columns: object) -> pl.DataFrame:
    base: dict[str, object] = {
        "prompt_id": ["p1", "p2"],
        "policy_model": ["a", "b"],
        "opponent": ["b", "b"],
        "preference": [1.0, 0.5],
    }
    return pl.DataFrame(base | columns)


def prompts(count: int, prompt_set: str = "main", prefix: str = "q") -> pl.DataFrame:
    return pl.DataFrame(
        [(f"{prefix}{n:04d}", prompt_set, [{"role": "user", "content": f"{prefix} number {n}"}]) for n in range(count)],
        schema=dict(PROMPTS.columns),
        orient="row",
    )


def parts(prompts: pl.DataFrame, config: SplitConfig | None = None, **options: object) -> dict[str, str]:
    return dict(split_prompts(prompts, config or SplitConfig(), **options).select("prompt_id", "part").rows())  # type: ignore[arg-type]


class TestResponses:
    def test_a_table_becomes_prompts_and_responses(self):
        found = ingest_responses(responses(), COLUMNS)
        assert found.prompts.rows() == [
            ("p1", "all", [{"role": "user", "content": "Why?"}]),
            ("p2", "all", [{"role": "user", "content": "How?"}]),
        ]
        assert found.responses.rows() == [("p1", "a", "because"), ("p1", "b", ""), ("p2", "a", "so")]
        assert (found.empty_responses, found.rows_filtered) == (1, 0)

    def test_the_order_of_rows_does_not_matter(self):
        forward, backward = (ingest_responses(table, COLUMNS) for table in (responses(), responses().reverse()))
        assert forward.prompts.equals(backward.prompts)
        assert forward.responses.equals(backward.responses)

    def test_without_ids_they_come_from_the_text(self):
        columns = ColumnNames(prompt_id=None)
        found = ingest_responses(responses().drop("prompt_id"), columns)
        assert found.prompts.get_column("prompt_id").to_list() == sorted(
            prompt_content_id([{"role": "user", "content": text}]) for text in ("Why?", "How?")
        )
        moved = ingest_responses(responses(prompt=["How?", "How?", "Why?"]).drop("prompt_id"), columns)
        assert moved.prompts.equals(found.prompts)

    def test_the_content_id_is_golden(self):
        # a change of it splits every prompt anew and no longer finds the prompts that a reward model was trained on
        assert prompt_content_id([{"role": "user", "content": "Wie geht’s?\n"}]) == "dae09e64e1c43dcf"

    def test_roles_and_the_borders_of_messages_are_part_of_the_id(self):
        conversations = [
            [{"role": "user", "content": "ab"}],
            [{"role": "system", "content": "ab"}],
            [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        ]
        assert len({prompt_content_id(conversation) for conversation in conversations}) == 3

    def test_messages_are_taken_with_their_fields_in_any_order(self):
        conversation = [{"content": "Be brief.", "role": "system"}, {"content": "Why?", "role": "user"}]
        found = ingest_responses(responses(prompt=[conversation] * 3, prompt_id=["p1", "p1", "p2"]), COLUMNS)
        assert found.prompts.schema["messages"] == MESSAGES
        assert found.prompts.get_column("messages").to_list()[0] == conversation

    def test_categorical_names_are_text(self):
        table = responses().with_columns(pl.col("policy_model").cast(pl.Categorical))
        assert ingest_responses(table, COLUMNS).responses.equals(ingest_responses(responses(), COLUMNS).responses)

    def test_whole_numbers_are_taken_as_ids(self):
        found = ingest_responses(responses(prompt_id=[1, 1, 2]), COLUMNS)
        assert found.prompts.get_column("prompt_id").to_list() == ["1", "2"]

    def test_one_id_with_two_texts_shows_both(self):
        with pytest.raises(TableError, match=r"'p1' has 2 different texts: '(Why|When)\?' / '(Why|When)\?'"):
            ingest_responses(responses(prompt=["Why?", "When?", "How?"]), COLUMNS)

    def test_one_prompt_in_two_sets_is_an_error_whatever_the_order(self):
        table = responses(benchmark=["x", "y", "x"])
        for rows in (table, table.reverse()):
            with pytest.raises(TableError, match=r"'p1' is in several prompt sets: \['x', 'y'\]"):
                ingest_responses(rows, ColumnNames(prompt_set="benchmark"))

    def test_two_responses_of_one_model_to_one_prompt_are_an_error(self):
        with pytest.raises(TableError, match=r"occur more than once"):
            ingest_responses(responses(policy_model=["a", "a", "a"]), COLUMNS)

    @pytest.mark.parametrize("column", ["prompt_id", "prompt", "policy_model", "response"])
    def test_a_missing_column_is_named_with_what_there_is(self, column: str):
        with pytest.raises(TableError, match=rf"lacks the columns \['{column}'\]; it has"):
            ingest_responses(responses().drop(column), COLUMNS)

    @pytest.mark.parametrize("column", ["prompt_id", "prompt", "policy_model", "response"])
    def test_empty_cells_are_counted(self, column: str):
        table = responses().with_columns(pl.when(pl.col("prompt_id") == "p1").then(column).alias(column))
        with pytest.raises(TableError, match=rf"'{column}' has 1 empty cells"):
            ingest_responses(table, COLUMNS)

    @pytest.mark.parametrize("column", ["prompt_id", "prompt", "policy_model", "response"])
    @pytest.mark.parametrize("value", [1.5, True, [1]])
    def test_a_column_of_another_type_is_named(self, column: str, value: object):
        with pytest.raises(TableError, match=rf"'{column}' must be text"):
            ingest_responses(responses(**{column: [value] * 3}), COLUMNS)

    def test_messages_without_a_role_are_refused(self):
        with pytest.raises(TableError, match=r"messages"):
            ingest_responses(responses(prompt=[[{"content": "Why?"}]] * 3), COLUMNS)
        with pytest.raises(TableError, match=r"lacks its role"):
            ingest_responses(
                responses(prompt=[[{"content": "Why?", "role": None}, {"content": "", "role": "user"}]] * 3), COLUMNS
            )

    def test_a_table_without_rows_is_an_error(self):
        with pytest.raises(TableError, match=r"has no rows"):
            ingest_responses(responses().clear(), COLUMNS)

    def test_filters_are_counted_and_never_silent(self):
        table = responses(kind=["x", "x", "y"], good=[True, False, True])
        kept = ingest_responses(table, COLUMNS, where={"kind": "x", "good": "true"})
        assert kept.responses.rows() == [("p1", "a", "because")]
        assert kept.rows_filtered == 2
        assert ingest_responses(table, COLUMNS, policy_models=["a"]).rows_filtered == 1
        assert ingest_responses(table, COLUMNS, exclude_prompts=["p1", "unknown"]).rows_filtered == 2
        assert (
            ingest_responses(
                table, ColumnNames(prompt_set="kind"), prompt_sets=["x"], exclude_prompts=["p2"]
            ).prompts.height
            == 1
        )

    def test_filters_that_leave_nothing_are_errors(self):
        with pytest.raises(TableError, match=r"no row has response = 'never'"):
            ingest_responses(responses(), COLUMNS, where={"response": "never"})
        with pytest.raises(TableError, match=r"lacks the columns \['nowhere'\]"):
            ingest_responses(responses(), COLUMNS, where={"nowhere": "x"})
        with pytest.raises(TableError, match=r"no response is left of 3 rows"):
            ingest_responses(responses(), COLUMNS, exclude_prompts=["p1", "p2"])

    def test_unknown_names_list_those_in_the_data(self):
        with pytest.raises(ConfigError, match=r"policy_model \['z'\] not in the data, which has \['a', 'b'\]"):
            ingest_responses(responses(), COLUMNS, policy_models=["z", "a"])
        with pytest.raises(ConfigError, match=r"prompt_set \['z'\] not in the data"):
            ingest_responses(responses(), COLUMNS, prompt_sets=["z"])

    @pytest.mark.real
    def test_the_real_responses(self, shared_data: Path):
        found = ingest_responses(
            pl.read_parquet(shared_data / "responses.parquet"),
            ColumnNames(prompt_set="benchmark", policy_model="model"),
            where={"is_bad": "false"},
            prompt_sets=["alpaca_eval"],
            policy_models=["gpt-4-1106-preview", "gemma-2-9b-it-simpo"],
        )
        assert found.prompts.height == 805
        assert found.responses.height == 2 * 805


class TestScores:
    def test_columns_of_other_names(self):
        table = scores().rename({"prompt_id": "id", "policy_model": "model", "score": "reward"})
        names = ColumnNames(prompt_id="id", policy_model="model", score="reward")
        assert ingest_scores(table, names).equals(ingest_scores(scores(), COLUMNS))

    def test_ids_from_the_text_are_those_of_the_responses(self):
        table = pl.DataFrame({"prompt": ["Why?"], "policy_model": ["a"], "score": [1]})
        names = ColumnNames(prompt_id=None)
        found = ingest_scores(table, names).get_column("prompt_id").to_list()
        assert found == [prompt_content_id([{"role": "user", "content": "Why?"}])]

    @pytest.mark.parametrize("value", [math.nan, math.inf, None])
    def test_scores_that_are_no_numbers_are_refused(self, value: float | None):
        with pytest.raises(TableError, match=r"'score'.*'p2'"):
            ingest_scores(scores(score=[1.0, value]), COLUMNS)

    def test_scores_as_text_are_refused(self):
        with pytest.raises(TableError, match=r"'score'.*must be Float64, not String"):
            ingest_scores(scores(score=["1.0", "2.0"]), COLUMNS)

    def test_duplicates_are_refused(self):
        with pytest.raises(TableError, match=r"occur more than once"):
            ingest_scores(scores(prompt_id=["p1", "p1"]), COLUMNS)

    def test_bf16_scores_keep_their_values(self):
        table = scores().with_columns(pl.col("score").cast(pl.Float32))
        assert ingest_scores(table, COLUMNS).get_column("score").to_list() == [1.5, -2.0]


class TestPreferences:
    def test_a_model_against_itself_is_left_out(self):
        assert ingest_preferences(preferences(), COLUMNS).rows() == [("p1", "a", "b", 1.0)]

    @pytest.mark.parametrize("value", [-0.1, 1.5, 2.0])
    def test_preferences_out_of_range_show_the_row(self, value: float):
        with pytest.raises(TableError, match=r"must be in \[0, 1\].*'p1'.*rescale"):
            ingest_preferences(preferences(preference=[value, 0.5]), COLUMNS)

    def test_missing_preferences_are_refused(self):
        with pytest.raises(TableError, match=r"preference_a.*1 nulls"):
            ingest_preferences(preferences(preference=[None, 0.5]), COLUMNS)

    def test_only_self_comparisons_leave_nothing(self):
        with pytest.raises(TableError, match=r"no rows"):
            ingest_preferences(preferences(policy_model=["b", "b"]), COLUMNS)

    @pytest.mark.real
    def test_the_real_judge(self, shared_data: Path):
        names = ColumnNames(policy_model="generator_2", opponent="generator_1", preference="p_model_wins")
        table = pl.read_parquet(shared_data / "alpacaeval_judge_prefs.parquet")
        found = ingest_preferences(table, names, where={"annotator": "weighted_alpaca_eval_gpt4_turbo"})
        means = dict(found.group_by("model_a").agg(pl.col("preference_a").mean()).rows())
        assert means["claude-2"] == pytest.approx(0.172, abs=5e-4)  # published: 17.2 %
        assert "gpt4_1106_preview" not in means  # the baseline, against itself


class TestSplit:
    def test_every_prompt_is_on_one_side(self):
        table = prompts(400)
        split = split_prompts(table, SplitConfig(held_out_fraction=0.3))
        assert split.get_column("prompt_id").to_list() == table.get_column("prompt_id").to_list()
        counts = dict(split.group_by("part").len().rows())
        assert set(counts) == {CALIBRATION, HELD_OUT}
        assert counts[HELD_OUT] == pytest.approx(120, abs=30)

    def test_the_split_is_golden(self):
        held_out = [name for name, part in parts(prompts(12)).items() if part == HELD_OUT]
        assert held_out == ["q0001", "q0002", "q0004", "q0009"]

    @settings(max_examples=30)
    @given(subset=st.sets(st.integers(0, 59), min_size=20), seed=st.integers(0, 9), fraction=st.floats(0.3, 0.7))
    def test_other_prompts_move_nobody(self, subset: set[int], seed: int, fraction: float):
        config = SplitConfig(seed=seed, held_out_fraction=fraction)
        everything = parts(prompts(60), config)
        try:
            some = parts(prompts(60)[sorted(subset)], config)
        except ConfigError:  # few prompts can all be on one side
            return
        assert some == {name: part for name, part in everything.items() if name in some}
        assert len(some) == len(subset)

    def test_the_order_of_the_rows_moves_nobody(self):
        table = prompts(50)
        assert parts(table.sample(fraction=1.0, shuffle=True, seed=1)) == parts(table)

    def test_a_larger_share_only_adds_to_the_held_out(self):
        few, many = (
            {
                name
                for name, part in parts(prompts(200), SplitConfig(held_out_fraction=share)).items()
                if part == HELD_OUT
            }
            for share in (0.2, 0.6)
        )
        assert few < many

    def test_another_seed_is_another_split(self):
        assert parts(prompts(60), SplitConfig(seed=1)) != parts(prompts(60), SplitConfig(seed=2))

    def test_a_text_under_two_ids_is_on_one_side(self):
        table = prompts(60)
        twins = table.with_columns(prompt_id="twin-of-" + pl.col("prompt_id"))
        found = parts(pl.concat([table, twins]))
        assert all(found[name] == found[f"twin-of-{name}"] for name in table.get_column("prompt_id"))

    def test_what_the_model_was_trained_on_is_never_held_out(self):
        table = pl.concat([prompts(100), prompts(60, "other", "o")])
        config = SplitConfig(held_out_prompt_sets=("other",))
        plain = parts(table, config)
        seen = [name for name, part in plain.items() if part != CALIBRATION][::2]
        found = parts(table, config, never_held_out=[*seen, "not in the table"])
        for name in seen:
            assert found.get(name) == (None if name.startswith("o") else CALIBRATION)
        assert {name: part for name, part in found.items() if name not in seen} == {
            name: part for name, part in plain.items() if name not in seen
        }

    def test_a_text_that_the_model_was_trained_on_under_another_id_is_not_held_out(self):
        table = prompts(60)
        seen = next(name for name, part in parts(table).items() if part == HELD_OUT)
        twin = table.filter(pl.col("prompt_id") == seen).with_columns(prompt_id=pl.lit("twin"))
        found = parts(pl.concat([table, twin]), never_held_out=["twin"])
        assert (found[seen], found["twin"]) == (CALIBRATION, CALIBRATION)

    def test_a_second_domain_is_apart_and_without_texts_of_the_first(self):
        copied = prompts(60)[:1].with_columns(prompt_id=pl.lit("copy"), prompt_set=pl.lit("other"))
        table = pl.concat([prompts(60), prompts(10, "other", "o"), copied])
        found = parts(table, SplitConfig(held_out_prompt_sets=("other",)))
        assert sorted(name for name, part in found.items() if part == HELD_OUT_DOMAIN) == [
            f"o{n:04d}" for n in range(10)
        ]
        assert "copy" not in found
        assert {name: part for name, part in found.items() if not name.startswith("o")} == parts(prompts(60))

    def test_limits_keep_a_stable_choice(self):
        table = pl.concat([prompts(100), prompts(30, "other", "o")])
        sets = {"held_out_prompt_sets": ("other",)}
        full = parts(table, SplitConfig(**sets))
        limits = {"max_calibration_prompts": 7, "max_held_out_prompts": 5, "max_domain_prompts": 3}
        few = parts(table, SplitConfig(**sets, **limits))
        assert sorted(few.values()) == [CALIBRATION] * 7 + [HELD_OUT] * 5 + [HELD_OUT_DOMAIN] * 3
        assert few.items() <= full.items()
        more = parts(table, SplitConfig(**sets, **{name: limit + 2 for name, limit in limits.items()}))
        assert few.items() <= more.items()

    def test_limits_fall_on_what_the_model_was_trained_on_first(self):
        seen = [f"q{n:04d}" for n in range(50)]
        found = parts(prompts(100), SplitConfig(max_calibration_prompts=20), never_held_out=seen)
        assert not {name for name, part in found.items() if part == CALIBRATION} & set(seen)

    def test_limits_beyond_the_prompts_change_nothing(self):
        assert parts(prompts(20), SplitConfig(max_calibration_prompts=999)) == parts(prompts(20))

    def test_a_part_without_prompts_is_an_error(self):
        with pytest.raises(ConfigError, match=r"no prompt is left for held_out out of 20"):
            parts(prompts(20), never_held_out=[f"q{n:04d}" for n in range(20)])
        with pytest.raises(ConfigError, match=r"no prompt is left for calibration"):
            parts(prompts(3, "other"), SplitConfig(held_out_prompt_sets=("other",)))
        table = pl.concat([prompts(60), prompts(1, "other", "o")])
        with pytest.raises(ConfigError, match=r"no prompt is left for held_out_domain"):
            parts(table, SplitConfig(held_out_prompt_sets=("other",)), never_held_out=["o0000"])

    def test_an_unknown_prompt_set_lists_those_in_the_data(self):
        message = re.escape("prompt_set ['arena-hard'] not in the data, which has ['main']")
        with pytest.raises(ConfigError, match=message):
            parts(prompts(5), SplitConfig(held_out_prompt_sets=("arena-hard",)))
