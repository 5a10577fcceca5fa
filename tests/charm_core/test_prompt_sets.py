"""Which prompts are used: nothing is left out without being counted, and a sample does not depend on what it need not."""

from collections.abc import Sequence
from typing import Any

import polars as pl
import pytest

from charm_core.conversations import layout_key
from charm_core.errors import ConfigError, TableError
from charm_core.prompt_formats import ROWS_SCHEMA, PromptReading, PromptRows, Unusable, read_prompts
from charm_core.prompt_sets import SelectedPrompts, SelectionRules, TrainedOn, select_prompts
from charm_core.responses import HELD_OUT, SplitConfig, prompt_content_id, split_prompts

ITEM = "Name the seven wonders of the ancient world and say in one sentence each what became of them"


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def rows(texts: Sequence[str], **columns: Any) -> PromptRows:
    found = [
        {"prompt": text, **{name: values[place] for name, values in columns.items()}}
        for place, text in enumerate(texts)
    ]
    named = {"prompt_id": "id"} if "id" in columns else {}
    sets = {"prompt_set": "domain"} if "domain" in columns else {}
    return read_prompts([found], PromptReading.model_validate({"columns": {**named, **sets}}))


def select(found: PromptRows, trained_on: TrainedOn | None = None, **rules: Any) -> SelectedPrompts:
    benchmarks = rules.pop("benchmarks", None)
    return select_prompts(found, SelectionRules.model_validate(rules), trained_on=trained_on, benchmarks=benchmarks)


def texts(selected: SelectedPrompts) -> set[str]:
    return {conversation[0]["content"] for conversation in selected.prompts.get_column("messages").to_list()}


def known(*contents: str) -> TrainedOn:
    return TrainedOn(keys=frozenset(layout_key(messages(content)) for content in contents))


def test_every_row_is_in_one_count_and_every_removed_one_is_listed():
    found = read_prompts(
        [
            [
                {"prompt": "kept one", "domain": "a"},
                {"prompt": "kept one", "domain": "a"},
                {"prompt": "Kept  ONE\n", "domain": "a"},
                {"prompt": "elsewhere", "domain": "b"},
                {"prompt": "", "domain": "a"},
                {"prompt": "learnt", "domain": "a"},
                {"prompt": f"{ITEM}!", "domain": "a"},
                {"prompt": "kept two", "domain": "a"},
                {"prompt": "kept three", "domain": "a"},
            ]
        ],
        PromptReading.model_validate({"columns": {"prompt_set": "domain"}}),
    )
    rules = {"prompt_sets": ("a",), "unusable": "skip", "exclude_trained_on": True, "limit": 2}
    selected = select(found, known("LEARNT"), benchmarks={"wonders": [ITEM]}, **rules)
    counts = selected.counts
    assert counts.model_dump(exclude={"unusable", "overlaps"}) == {
        "rows": 9,
        "filtered": 1,
        "repeated": 1,
        "repeated_but_for_layout": 1,
        "trained_on": 1,
        "trained_on_left_out": 1,
        "overlapping": 1,
        "over_limit": 1,
        "prompts": 2,
    }
    assert counts.unusable == (Unusable(reason="the last message is empty", rows=1, first_row=5),)
    assert counts.overlaps[0].examples == (prompt_content_id(messages(f"{ITEM}!")),)
    assert selected.removed.select("row", "reason").rows()[:4] == [
        (2, "repeated"),
        (3, "repeated but for case and white space"),
        (6, "trained on"),
        (7, "overlap with a benchmark"),
    ]
    assert selected.removed.height == 5
    assert len(texts(selected) & {"kept one", "kept two", "kept three"}) == 2
    (summary, overlap) = counts.sentences()
    assert summary.startswith(
        "Prompts: 2 of 9 rows are used; 1 filtered, 1 unusable (the last message is empty), 1 the same"
    )
    assert overlap.startswith("1 prompts overlap with wonders (1 texts): ")


def test_nothing_to_say_where_nothing_was_left_out():
    selected = select(rows(["a", "b"]), benchmarks={"none of them": [ITEM]})
    assert selected.counts.sentences() == ()
    assert (selected.counts.prompts, selected.removed.height, selected.trained_on.height) == (2, 0, 0)


def test_a_sample_depends_on_content_and_seed_only():
    names = [f"question {n}" for n in range(300)]
    drawn = texts(select(rows(names), limit=100))
    assert len(drawn) == 100
    assert texts(select(rows(names[::-1]), limit=100)) == drawn
    assert texts(select(rows(names, id=[f"id-{n}" for n in range(300)]), limit=100)) == drawn
    other = texts(select(rows(names), limit=100, seed=1))
    assert 10 < len(other & drawn) < 60  # a third is expected by chance


def test_additions_move_prompts_in_or_out_by_rank_alone():
    names = [f"question {n}" for n in range(300)]
    before, after = (
        texts(select(rows(names), limit=100)),
        texts(select(rows([*names, *map(str, range(30))]), limit=100)),
    )
    assert before - after  # pushed out by new ones
    assert not (after - before) & set(names)  # no old one came in
    assert texts(select(rows(names), limit=60)) < before


def test_a_sample_is_split_into_both_parts():
    # ranked by the digest that splits, the lowest tenth would be held out as a whole
    drawn = select(rows([f"question {n}" for n in range(2000)]), limit=200).prompts
    parts = split_prompts(drawn, SplitConfig(held_out_fraction=0.5, seed=0)).get_column("part").value_counts()
    assert 70 < dict(parts.iter_rows())[HELD_OUT] < 130


def test_a_limit_above_the_prompts_takes_all():
    assert select(rows(["a", "b"]), limit=5).counts.prompts == 2


def test_the_first_of_equal_contents_is_kept_and_the_ids_are_the_users():
    selected = select(rows(["Same", "same", "same", "other"], id=["z", "y", "y", "x"]))
    assert selected.prompts.get_column("prompt_id").to_list() == ["x", "z"]
    assert (selected.counts.repeated, selected.counts.repeated_but_for_layout) == (1, 1)


def test_an_id_with_two_contents_is_an_error():
    with pytest.raises(TableError, match=r"1 prompt ids have several contents, first 'p' in the rows \[1, 3\]"):
        select(rows(["a", "b", "c"], id=["p", "q", "p"]))


def test_trained_on_by_id_reaches_prompts_of_the_same_content():
    found = rows(["Same", "same", "other"], id=["kept", "dropped", "x"])
    marked = select(found, TrainedOn(ids=frozenset({"dropped", "never seen"})))
    assert marked.trained_on.get_column("prompt_id").to_list() == ["kept"]
    assert (marked.counts.prompts, marked.counts.trained_on, marked.counts.trained_on_left_out) == (2, 1, 0)
    left_out = select(found, TrainedOn(ids=frozenset({"dropped"})), exclude_trained_on=True)
    assert left_out.prompts.get_column("prompt_id").to_list() == ["x"]
    assert left_out.trained_on.is_empty()


@pytest.mark.parametrize(
    ("trained_on", "given"),
    [(known("unheard of", "this too"), "2 prompts"), (TrainedOn(ids=frozenset({"q"})), "1 ids")],
)
def test_trained_on_that_matches_nothing_is_an_error(trained_on: TrainedOn, given: str):
    with pytest.raises(ConfigError, match=f"none of the 2 prompts is among the {given} of trained_on"):
        select(rows(["a", "b"]), trained_on)


def test_overlap_is_of_what_the_user_says():
    conversation = [
        {"role": "system", "content": ITEM},
        {"role": "user", "content": "Go on then"},
        {"role": "assistant", "content": ITEM},
        {"role": "user", "content": "Once more"},
    ]
    frame = pl.DataFrame(
        [(1, "assistant", "all", conversation), (2, "user", "all", [*conversation[:1], *messages(f"Please. {ITEM}")])],
        schema=ROWS_SCHEMA,
        orient="row",
    )
    selected = select(PromptRows(frame=frame, rows=2, filtered=0), benchmarks={"wonders": [ITEM]})
    assert selected.prompts.get_column("prompt_id").to_list() == ["assistant"]


def test_a_prompt_in_two_benchmarks_is_counted_in_both_and_left_out_once():
    selected = select(
        rows([ITEM, "other", *(f"{ITEM} {n}" for n in range(7))]),
        benchmarks={"one": [ITEM], "two": ["x", ITEM], "three": ["x"]},
    )
    assert [(overlap.benchmark, overlap.texts, overlap.prompts) for overlap in selected.counts.overlaps] == [
        ("one", 1, 8),
        ("three", 1, 0),
        ("two", 2, 8),
    ]
    assert selected.counts.overlapping == 8
    assert selected.counts.sentences()[1].endswith(" and others.")


def test_unusable_rows_are_an_error_unless_skipped():
    found = rows(["a", "", ""])
    with pytest.raises(
        TableError, match=r"2 of 3 rows cannot be asked: 2 because of: the last message is empty \(first row 2\)"
    ):
        select(found)
    assert select(found, unusable="skip").counts.prompts == 1


@pytest.mark.parametrize(
    ("found", "rules", "error", "message"),
    [
        (
            rows(["a"], domain=["x"]),
            {"prompt_sets": ("y",)},
            ConfigError,
            r"prompt sets \['y'\] are not in the source, which has \['x'\]",
        ),
        (
            rows([ITEM]),
            {"benchmarks": {"wonders": [ITEM]}},
            TableError,
            "no prompt is left. Prompts: 0 of 1 rows are used; 1 left out",
        ),
        (rows([""]), {"unusable": "skip"}, TableError, "no prompt is left"),
    ],
)
def test_what_leaves_nothing(found: PromptRows, rules: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        select(found, **rules)
