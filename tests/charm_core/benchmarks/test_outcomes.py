import pytest

from charm_core.benchmarks.items import BenchmarkItem, conversation
from charm_core.benchmarks.outcomes import OUTCOMES, Outcome, ScoredItem, outcomes_table, shared_top, strictly_above
from charm_core.errors import TableError
from charm_core.tables import validate


def _scored(chosen: tuple[float, ...], rejected: tuple[float, ...], **changes: object) -> ScoredItem:
    item = BenchmarkItem(
        item_id="1",
        subset="a",
        messages=conversation("q"),
        chosen=("right",) * len(chosen),
        rejected=("wrong",) * len(rejected),
    )
    return ScoredItem(item=item.model_copy(update=changes), chosen=chosen, rejected=rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "credit", "tied"),
    [
        ((1.0,), (0.9,), 1.0, 0.0),
        ((1.0,), (1.0,), 0.0, 1.0),
        ((0.9,), (1.0,), 0.0, 0.0),
        ((1.0,), (0.0, 0.5, 0.9), 1.0, 0.0),
        ((1.0,), (0.0, 1.0, 0.9), 0.0, 1.0),
        ((1.0, 3.0), (2.0,), 0.0, 0.0),
    ],
)
def test_strictly_above_every_wrong_response(
    chosen: tuple[float, ...], rejected: tuple[float, ...], credit: float, tied: float
) -> None:
    (outcome,) = strictly_above([_scored(chosen, rejected)])
    assert (outcome.credit, outcome.won, outcome.tied) == (credit, credit == 1.0, tied)


@pytest.mark.parametrize(
    ("chosen", "rejected", "credit", "won", "tied"),
    [
        (2.0, (1.0, 0.0, -1.0), 1.0, True, 0.0),
        (2.0, (2.0, 0.0, -1.0), 1 / 2, False, 1.0),
        (2.0, (2.0, 0.0, 2.0), 1 / 3, False, 1.0),
        (2.0, (2.0, 2.0, 2.0), 1 / 4, False, 1.0),
        (1.0, (2.0, 0.0, -1.0), 0.0, False, 0.0),
        (1.0, (2.0, 1.0, 1.0), 0.0, False, 0.0),  # ties below the top do not matter
    ],
)
def test_the_credit_of_a_shared_top(
    chosen: float, rejected: tuple[float, ...], credit: float, won: bool, tied: float
) -> None:
    outcome = shared_top(_scored((chosen,), rejected))
    assert (outcome.credit, outcome.won, outcome.tied) == (credit, won, tied)


def test_an_item_counts_in_all_of_its_subsets() -> None:
    outcomes = list(strictly_above([_scored((1.0,), (0.0,), also_in=("b", "c"), group="g", stratum="s")]))
    assert [(outcome.subset, outcome.unit, outcome.stratum) for outcome in outcomes] == [
        ("a", "g", "s"),
        ("b", "g", "s"),
        ("c", "g", "s"),
    ]


def test_outcomes_are_a_table() -> None:
    rows = [
        Outcome("2", "a", "accuracy", "a", "2", 1.0, True, None),
        Outcome("1", "a", "accuracy", "a", "1", 0.0, False, 0.5),
    ]
    table = outcomes_table(rows)
    assert validate(table, OUTCOMES).equals(table)
    assert table.get_column("item_id").to_list() == ["1", "2"]
    with pytest.raises(
        TableError, match="benchmark outcomes table has 2 rows whose item_id, subset, metric occur more"
    ):
        outcomes_table([rows[0], rows[0]])
