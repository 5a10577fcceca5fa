import pytest

from charm_core.errors import RatingsError
from charm_core.leaderboard_formats import FORMATS, table_format


@pytest.mark.parametrize("name", FORMATS)
def test_a_table_is_recognised_by_its_columns_whatever_else_it_has(name: str):
    columns = FORMATS[name].columns
    assert table_format(["before", *reversed(columns), "after"]) is FORMATS[name]


def test_a_changed_schema_shows_what_was_expected_and_what_was_found():
    with pytest.raises(
        RatingsError,
        match=r"\['model', 'score', '95_pct_ci', 'votes'\].*closest one, 'mirror'.*lacks the columns \['arena_score'\]",
    ):
        table_format(["model", "score", "95_pct_ci", "votes"])
    columns = ["model_name", "rating", "rating_upper", "vote_count", "category", "leaderboard_publish_date"]
    with pytest.raises(RatingsError, match=r"closest one, 'official'.*lacks the columns \['rating_lower'\]"):
        table_format(columns)
