"""Snapshots: kept once, never changed, found by date or digest."""

import datetime
from pathlib import Path

import pytest

from charm_core.errors import RatingsError
from tasks.ratings.snapshots import (
    BoardName,
    KeptSnapshot,
    RatingSnapshot,
    find_snapshot,
    keep_snapshots,
    list_snapshots,
)
from tasks.store import ArtifactRef, ArtifactStore

DAY = datetime.date(2025, 2, 28)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))


def snapshot(content: str = "a", **changes: object) -> RatingSnapshot:
    board = {"publisher": "p", "category": "overall", "style_control": False}
    board |= {name: changes.pop(name) for name in list(changes) if name in BoardName.model_fields}
    digest = content.encode().hex().ljust(64, "0")
    ratings = ArtifactRef(
        kind="ratings", digest=digest, uri=f"/store/ratings/{digest[:2]}/{digest}.parquet", rows=3, size=9
    )
    usual = {"date": DAY, "date_kind": "published", "url": "https://x/board.json", "revision": None}
    return RatingSnapshot.model_validate({"board": board, "ratings": ratings} | usual | changes)


def keep(store: ArtifactStore, *snapshots: RatingSnapshot) -> tuple[KeptSnapshot, ...]:
    """As they are read back: with their ratings where this store has them."""
    digests = [kept.digest for kept in keep_snapshots(store, snapshots)]
    stored = {kept.digest: kept for kept in list_snapshots(store)}
    return tuple(stored[digest] for digest in digests)


def test_the_same_board_asked_for_twice_is_one_snapshot(store: ArtifactStore):
    (first,) = keep(store, snapshot())
    (again,) = keep(store, snapshot(url="https://elsewhere/board.json", revision="f" * 40, licence="other"))
    assert again == first
    assert again.snapshot.url == "https://x/board.json"  # a snapshot never changes
    assert list_snapshots(store) == (first,)


def test_twice_in_one_collection_is_one_snapshot_too(store: ArtifactStore):
    first, second = keep(store, snapshot(), snapshot(url="https://elsewhere"))
    assert first == second
    assert len(list_snapshots(store)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"date": DAY + datetime.timedelta(1)},
        {"content": "b"},
        {"publisher": "q"},
        {"category": "math"},
        {"style_control": True},
        {"arena": "vision"},
    ],
)
def test_another_board_date_or_number_is_another_snapshot(store: ArtifactStore, changes: dict[str, object]):
    keep(store, snapshot(), snapshot(**changes))  # type: ignore[arg-type]
    assert len(list_snapshots(store)) == 2


def test_they_are_listed_by_board_and_date(store: ArtifactStore):
    days = [DAY + datetime.timedelta(days) for days in (5, 0, 9)]
    keep(store, *(snapshot(date=day) for day in days), snapshot(publisher="a"), snapshot(date=None, content="c"))
    listed = [(kept.snapshot.board.publisher, kept.snapshot.date) for kept in list_snapshots(store)]
    assert listed == [("a", DAY), ("p", None), *(("p", day) for day in sorted(days))]
    assert list_snapshots(ArtifactStore(url=f"{store.url}-empty", work_folder=".")) == ()


def test_a_damaged_record_is_left_out_and_written_anew(store: ArtifactStore, caplog: pytest.LogCaptureFixture):
    (kept,) = keep(store, snapshot())
    (record,) = Path(store.url).rglob("*.json")
    for content, why in ((record.read_bytes().replace(b'"p"', b'"q"'), "does not match"), (b"{}", "another form")):
        record.write_bytes(content)
        assert list_snapshots(store) == ()
        assert why in caplog.text
        caplog.clear()
    assert keep(store, snapshot()) == (kept,)
    assert list_snapshots(store) == (kept,)


def test_a_store_may_be_moved(store: ArtifactStore, tmp_path: Path):
    keep(store, snapshot())
    moved = Path(store.url).rename(tmp_path / "moved")
    (kept,) = list_snapshots(ArtifactStore(url=str(moved), work_folder="."))
    digest = kept.snapshot.ratings.digest
    assert kept.snapshot.ratings.uri == f"{moved}/ratings/{digest[:2]}/{digest}.parquet"


class TestPins:
    def test_by_date(self, store: ArtifactStore):
        _, wanted = keep(store, snapshot(), snapshot(date=DAY + datetime.timedelta(1)))
        assert find_snapshot(store, "2025-03-01", {}) == wanted

    def test_by_the_beginning_of_its_digest_or_that_of_its_ratings(self, store: ArtifactStore):
        wanted, _ = keep(store, snapshot("abc"), snapshot("xyz"))
        assert find_snapshot(store, wanted.digest[:6], {}) == wanted
        assert find_snapshot(store, wanted.digest.upper(), {}) == wanted
        assert find_snapshot(store, wanted.snapshot.ratings.digest[:8], {}) == wanted

    def test_a_date_needs_the_usual_board_and_a_digest_does_not(self, store: ArtifactStore):
        plain, styled = keep(store, snapshot(), snapshot("b", style_control=True))
        usual = {"style_control": False, "category": "overall"}
        assert find_snapshot(store, "2025-02-28", {}, by_date=usual) == plain
        assert find_snapshot(store, styled.digest, {}, by_date=usual) == styled
        with pytest.raises(RatingsError, match=r"no snapshot.*with style_control False"):
            find_snapshot(store, styled.digest, {"style_control": False})

    def test_several_are_an_error_that_lists_them(self, store: ArtifactStore):
        first, second = keep(store, snapshot(), snapshot("b", publisher="q"))
        with pytest.raises(RatingsError, match=r"2 snapshots match '2025-02-28'") as caught:
            find_snapshot(store, "2025-02-28", {})
        assert first.short in str(caught.value)
        assert second.short in str(caught.value)
        assert find_snapshot(store, "2025-02-28", {"publisher": "q"}) == second

    def test_identical_numbers_of_two_dates_are_two_snapshots_and_ambiguous_by_their_ratings(
        self, store: ArtifactStore
    ):
        first, _ = keep(store, snapshot(), snapshot(date=DAY + datetime.timedelta(1)))
        with pytest.raises(RatingsError, match=r"2 snapshots match"):
            find_snapshot(store, first.snapshot.ratings.digest[:10], {})

    def test_none_is_an_error_that_lists_the_nearest(self, store: ArtifactStore):
        keep(store, *(snapshot(date=DAY + datetime.timedelta(days)) for days in range(0, 200, 10)))
        with pytest.raises(RatingsError, match=r"matches '2025-04-21'.*there are 2025-04-19 .*and 8 more"):
            find_snapshot(store, "2025-04-21", {})
        with pytest.raises(RatingsError, match=r"matches 'ffffff'"):
            find_snapshot(store, "ffffff", {})

    def test_an_empty_store_says_how_to_fill_it(self, store: ArtifactStore):
        with pytest.raises(RatingsError, match=r"there are none; collect it with python -m flows.collect_ratings"):
            find_snapshot(store, "2025-02-28", {})

    @pytest.mark.parametrize("pin", ["2025-2-30", "28.02.2025", "latest", "abc", "xyzxyzxyz", ""])
    def test_other_words_are_no_pins(self, store: ArtifactStore, pin: str):
        with pytest.raises(RatingsError, match=r"arena.snapshot must be a date such as 2025-02-28"):
            find_snapshot(store, pin, {})
