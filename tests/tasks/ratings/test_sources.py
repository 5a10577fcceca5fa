"""Where leaderboards lie: files, folders, addresses, and the hub dataset behind a server that speaks the hub's API."""

import io
import json
from pathlib import Path

import polars as pl
import pytest

from charm_core.errors import CharmError, ConfigError, RatingsError, ServiceError
from tasks.ratings.fetching import FetchConfig
from tasks.ratings.sources import OFFICIAL_DATASET, Located, SourceQuery, local_file, locate
from tests.leaderboard_server import COMMIT, Answer, hub, serve

QUICK = FetchConfig(allow_http=True, backoff_seconds=0.01, max_tries=2)


def query(source: str, **changes: object) -> SourceQuery:
    usual = {
        "source": source, "arena": "text", "style_control": False, "whole_history": False, "revision": None,
        "hub_endpoint": "https://huggingface.co", "fetching": QUICK,
    }  # fmt: skip
    return SourceQuery.model_validate(usual | changes)


def parquet(**columns: object) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(columns or {"model_name": ["m"]}).write_parquet(buffer)
    return buffer.getvalue()


FILES = {
    "README.md": b"# card",
    "text/latest-00000-of-00001.parquet": parquet(model_name=["latest"]),
    "text/full-00000-of-00002.parquet": parquet(model_name=["old"]),
    "text/full-00001-of-00002.parquet": parquet(model_name=["new"]),
    "text_style_control/latest-00000-of-00001.parquet": parquet(model_name=["styled"]),
}


def names(located: Located) -> list[str]:
    return [pl.read_parquet(file.path)["model_name"][0] for file in located.files]


class TestFiles:
    def test_a_file_is_called_by_its_name(self, tmp_path: Path):
        (tmp_path / "board.csv").write_text("policy_model,rating\na,1\n")
        located = locate(query(str(tmp_path / "board.csv")), tmp_path)
        assert (located.origin.shown, located.origin.publisher) == ("board.csv", "board.csv")
        assert located.origin.url == str(tmp_path / "board.csv")

    @pytest.mark.parametrize(
        ("source", "error", "message"),
        [
            (
                "nowhere.csv",
                ConfigError,
                r"there is no file or folder 'nowhere.csv'.*neither an https address nor a dataset id",
            ),
            ("./boards/board", ConfigError, r"there is no file or folder"),
            ("http://example.org/board.json", ConfigError, r"not encrypted"),
            ("s3://bucket/board.json", ConfigError, r"not an https address"),
            ("https://example.org/elo_results.pkl", ConfigError, r"is a pickle"),
        ],
    )
    def test_sources_that_are_none(self, tmp_path: Path, source: str, error: type[CharmError], message: str):
        with pytest.raises(error, match=message):
            locate(query(source, fetching=FetchConfig()), tmp_path)

    def test_a_local_pickle_is_refused_too(self, tmp_path: Path):
        (tmp_path / "elo_results.pkl").write_bytes(b"\x80\x04.")
        with pytest.raises(ConfigError, match=r"is a pickle: to open one runs whatever code"):
            locate(query(str(tmp_path / "elo_results.pkl")), tmp_path)

    @pytest.mark.parametrize(
        ("name", "style"), [("leaderboard-text-style-control.json", False), ("leaderboard-text.json", True)]
    )
    def test_a_name_that_contradicts_the_settings(self, tmp_path: Path, name: str, style: bool):
        (tmp_path / name).write_text("{}")
        with pytest.raises(
            ConfigError, match=rf"{name} is a board with(out)? style control by its name, but arena.style_control"
        ):
            locate(query(str(tmp_path / name), style_control=style), tmp_path)
        assert locate(query(str(tmp_path / name), style_control=not style), tmp_path).files

    def test_the_hub_datasets_folder_says_so_too_and_other_folders_do_not(self, tmp_path: Path):
        (tmp_path / "text_style_control").mkdir()
        for name in ("latest-00000-of-00001.parquet", "board.parquet"):
            (tmp_path / "text_style_control" / name).write_bytes(parquet())
        with pytest.raises(ConfigError, match=r"text_style_control/latest-00000.* is a board with style control"):
            locate(query(str(tmp_path / "text_style_control" / "latest-00000-of-00001.parquet")), tmp_path)
        assert locate(query(str(tmp_path / "text_style_control" / "board.parquet")), tmp_path).files


class TestAddresses:
    def test_an_address_is_fetched_and_secrets_in_it_are_not_shown(self, tmp_path: Path):
        with serve(lambda _: Answer(body=b'{"full": {}}')) as server:
            source = server.url.replace("://", "://me:secret@") + "/boards/board.json?token=secret"
            located = locate(query(source), tmp_path)
        host = server.url.removeprefix("http://")
        assert located.origin.url == f"http://{host}/boards/board.json"
        assert located.origin.publisher == f"{host}/boards/board.json"
        assert "secret" not in located.origin.model_dump_json()
        assert Path(located.files[0].path).read_bytes() == b'{"full": {}}'

    @pytest.mark.parametrize(
        ("path", "publisher", "revision"),
        [
            ("https://raw.githubusercontent.com/lmarena/arena-catalog/main/data/leaderboard-text.json", "lmarena/arena-catalog", None),
            (f"https://raw.githubusercontent.com/lmarena/arena-catalog/{COMMIT}/data/x.json", "lmarena/arena-catalog", COMMIT),
            (f"https://huggingface.co/datasets/a/b/resolve/{COMMIT}/x.csv", "a/b", COMMIT),
            (f"https://example.org/{COMMIT}/x.csv", "example.org/…/x.csv", COMMIT),
        ],
    )  # fmt: skip
    def test_all_versions_of_a_file_have_one_publisher(self, path: str, publisher: str, revision: str | None):
        from tasks.ratings.sources import _COMMIT, _publisher

        found = _COMMIT.search(path)
        assert (_publisher(path), found[0] if found else None) == (publisher, revision)

    def test_a_copy_that_stands_in_for_the_server_is_mentioned(self, tmp_path: Path):
        with serve(lambda _: Answer(body=b'{"full": {}}')) as server:
            fresh = locate(query(f"{server.url}/board.json"), tmp_path)
        lenient = QUICK.model_copy(update={"when_down": "use_copy"})
        stale = locate(query(f"{server.url}/board.json", fetching=lenient), tmp_path)
        assert fresh.origin.notes == ()
        assert "the server did not answer: a copy of 20" in stale.origin.notes[0]


class TestHub:
    def test_a_branch_becomes_the_commit_that_it_stands_for(self, tmp_path: Path):
        with serve(hub(OFFICIAL_DATASET, FILES)) as server:
            located = locate(query(OFFICIAL_DATASET, hub_endpoint=server.url), tmp_path)
        origin = located.origin
        assert names(located) == ["latest"]
        assert (origin.publisher, origin.revision, origin.licence) == (OFFICIAL_DATASET, COMMIT, "cc-by-4.0")
        assert (
            origin.url
            == f"{server.url}/datasets/{OFFICIAL_DATASET}/resolve/{COMMIT}/text/latest-00000-of-00001.parquet"
        )
        assert origin.shown == f"{OFFICIAL_DATASET} text/latest"
        assert "Arena" in origin.attribution
        assert not any("authorization" in asked.headers for asked in server.asked)

    def test_history_and_style_control_are_other_files(self, tmp_path: Path):
        with serve(hub(OFFICIAL_DATASET, FILES)) as server:
            endpoint = {"hub_endpoint": server.url}
            assert names(locate(query(OFFICIAL_DATASET, whole_history=True, **endpoint), tmp_path)) == ["old", "new"]
            assert names(locate(query(OFFICIAL_DATASET, style_control=True, **endpoint), tmp_path)) == ["styled"]

    def test_a_second_look_fetches_nothing_that_has_not_changed(self, tmp_path: Path):
        with serve(hub(OFFICIAL_DATASET, FILES)) as server:
            locate(query(OFFICIAL_DATASET, hub_endpoint=server.url), tmp_path)
            before = len(server.asked)
            locate(query(OFFICIAL_DATASET, hub_endpoint=server.url), tmp_path)
            again = [asked for asked in server.asked[before:] if "resolve" in asked.path]
        assert len(again) == 1
        assert "if-none-match" in again[0].headers

    def test_too_much_is_refused_before_anything_is_fetched(self, tmp_path: Path):
        small = QUICK.model_copy(update={"max_megabytes": 0.0001})
        with serve(hub(OFFICIAL_DATASET, FILES)) as server:
            with pytest.raises(
                ServiceError, match=r"text/latest has 0 MB, more than the 0.0001 MB of fetching.max_megabytes"
            ):
                locate(query(OFFICIAL_DATASET, hub_endpoint=server.url, fetching=small), tmp_path)
            assert not any("resolve" in asked.path for asked in server.asked)

    def test_content_that_is_not_what_the_hub_lists_is_refused(self, tmp_path: Path):
        wrong = {"text/latest-00000-of-00001.parquet": "0" * 64}
        lying = hub(OFFICIAL_DATASET, FILES, sha256=wrong)
        with serve(lying) as server, pytest.raises(ServiceError, match=r"but the hub lists 0000"):
            locate(query(OFFICIAL_DATASET, hub_endpoint=server.url), tmp_path)

    @pytest.mark.parametrize(
        ("source", "changes", "error", "message"),
        [
            (OFFICIAL_DATASET, {"revision": "nope"}, ConfigError, r"has no revision 'nope'; correct arena.revision"),
            ("no/such", {}, ConfigError, r"there is no file, folder or hub dataset 'no/such'"),
            (
                OFFICIAL_DATASET,
                {"arena": "vision"},
                RatingsError,
                r"has no files vision/latest; it has text/full, text/latest",
            ),
        ],
    )
    def test_what_is_not_there(
        self, tmp_path: Path, source: str, changes: dict[str, str], error: type[CharmError], message: str
    ):
        with serve(hub(OFFICIAL_DATASET, FILES)) as server, pytest.raises(error, match=message):
            locate(query(source, hub_endpoint=server.url, **changes), tmp_path)

    def test_a_hub_that_is_down(self, tmp_path: Path):
        with pytest.raises(ServiceError, match=r"the hub http://127.0.0.1:9 does not answer for lmarena-ai"):
            locate(query(OFFICIAL_DATASET, hub_endpoint="http://127.0.0.1:9"), tmp_path)

    @pytest.mark.parametrize("body", [b"not json", json.dumps({"id": "x", "sha": "main"}).encode(), b"[]"])
    def test_a_server_that_is_no_hub(self, tmp_path: Path, body: bytes):
        with serve(lambda _: Answer(body=body)) as server, pytest.raises(ServiceError, match=r"the hub http"):
            locate(query(OFFICIAL_DATASET, hub_endpoint=server.url), tmp_path)

    def test_a_hub_without_encryption_is_refused(self, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"not encrypted"):
            locate(query(OFFICIAL_DATASET, hub_endpoint="http://example.org", fetching=FetchConfig()), tmp_path)

    def test_a_folder_in_the_layout_of_the_dataset(self, tmp_path: Path):
        for name, content in FILES.items():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "copy" / name).write_bytes(content)
        located = locate(query(str(tmp_path / "copy"), whole_history=True), tmp_path)
        assert names(located) == ["old", "new"]
        assert (located.origin.publisher, located.origin.revision) == ("copy", None)

    def test_the_hubs_own_cache_folder_says_which_dataset_and_commit_it_is(self, tmp_path: Path):
        folder = tmp_path / "datasets--lmarena-ai--leaderboard-dataset" / "snapshots" / COMMIT
        (folder / "text").mkdir(parents=True)
        (folder / "text" / "latest-00000-of-00001.parquet").write_bytes(parquet())
        origin = locate(query(str(folder)), tmp_path).origin
        assert (origin.publisher, origin.revision, origin.licence) == (OFFICIAL_DATASET, COMMIT, "CC BY 4.0")


def test_a_file_that_accompanies_a_source(tmp_path: Path):
    with serve(lambda _: Answer(body=b'[{"a": 1}]')) as server:
        fetched = local_file(f"{server.url}/responses.json", QUICK, tmp_path)
    assert Path(fetched.path).read_bytes() == b'[{"a": 1}]'
    assert local_file(fetched.path, QUICK, tmp_path).digest == fetched.digest
    with pytest.raises(ConfigError, match=r"is a pickle"):
        local_file("responses.pkl", QUICK, tmp_path)
