"""Fetching from a real server on loopback that misbehaves in every way that we could think of."""

import datetime
import email.utils
from pathlib import Path

import pytest

from charm_core.errors import CharmError, ConfigError, ServiceError
from tasks.ratings.fetching import FetchConfig, Fetched, check_url, fetch, suffix_of
from tests.leaderboard_server import Answer, Asked, endless, in_turn, serve, trickle, with_etag

BODY = b'{"full": {}}'


def config(**changes: object) -> FetchConfig:
    quick = {"allow_http": True, "backoff_seconds": 0.01, "connect_seconds": 2, "read_seconds": 2, "max_tries": 3}
    return FetchConfig.model_validate(quick | changes)


def got(url: str, folder: Path, **changes: object) -> Fetched:
    return fetch(f"{url}/board.json", config(**changes), folder)


class TestCopies:
    def test_a_file_is_fetched_and_identified(self, tmp_path: Path):
        with serve(with_etag(BODY)) as server:
            fetched = got(server.url, tmp_path)
        assert fetched.path.read_bytes() == BODY
        assert (fetched.path.name, fetched.size) == (f"{fetched.digest}.json", len(BODY))
        assert (fetched.etag, fetched.outcome) == ('"v1"', "new")
        assert server.asked[0].headers["accept-encoding"] == "identity"
        assert "charm" in server.asked[0].headers["user-agent"]

    def test_a_second_look_asks_whether_it_changed_and_takes_the_copy(self, tmp_path: Path):
        with serve(with_etag(BODY)) as server:
            first, second = got(server.url, tmp_path), got(server.url, tmp_path)
        assert server.asked[1].headers["if-none-match"] == '"v1"'
        assert server.asked[1].headers["if-modified-since"] == "Fri, 28 Feb 2025 10:00:00 GMT"
        assert (second.outcome, second.path, second.fetched_at) == ("unchanged", first.path, first.fetched_at)

    def test_a_changed_file_is_fetched_again(self, tmp_path: Path):
        changed = with_etag(b"[2]", '"v2"')
        answers = iter([with_etag(BODY), changed])
        with serve(lambda asked: next(answers)(asked)) as server:
            got(server.url, tmp_path)
            fetched = got(server.url, tmp_path)
        assert (fetched.path.read_bytes(), fetched.etag, fetched.outcome) == (b"[2]", '"v2"', "new")

    def test_a_damaged_copy_is_fetched_again_without_conditions(self, tmp_path: Path):
        with serve(with_etag(BODY)) as server:
            got(server.url, tmp_path).path.write_bytes(b"damaged")
            fetched = got(server.url, tmp_path)
        assert "if-none-match" not in server.asked[1].headers
        assert (fetched.path.read_bytes(), fetched.outcome) == (BODY, "new")

    def test_a_folder_of_copies_may_be_moved(self, tmp_path: Path):
        with serve(with_etag(BODY)) as server:
            got(server.url, tmp_path / "here")
            (tmp_path / "here").rename(tmp_path / "there")
            fetched = got(server.url, tmp_path / "there")
        assert fetched.outcome == "unchanged"
        assert fetched.path.read_bytes() == BODY

    def test_versions_under_several_addresses_can_share_a_copy(self, tmp_path: Path):
        with serve(with_etag(BODY)) as server:
            fetch(f"{server.url}/1/board.json", config(), tmp_path, key="board")
            assert fetch(f"{server.url}/2/board.json", config(), tmp_path, key="board").outcome == "unchanged"

    def test_nothing_half_written_is_left(self, tmp_path: Path):
        with serve(lambda _: Answer(body=BODY, length=len(BODY) + 10)) as server, pytest.raises(ServiceError):
            got(server.url, tmp_path)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class TestServersThatAreDown:
    def test_an_old_copy_is_never_used_in_silence(self, tmp_path: Path):
        with serve(with_etag(BODY)) as server:
            first = got(server.url, tmp_path)
        with pytest.raises(
            ServiceError, match=rf"could not be fetched in 2 tries.*copy of {first.fetched_at[:10]}.*use_copy"
        ):
            got(server.url, tmp_path, max_tries=2)

    def test_an_old_copy_is_used_and_marked_if_the_user_says_so(self, tmp_path: Path):
        with serve(with_etag(BODY)) as server:
            got(server.url, tmp_path)
        stale = got(server.url, tmp_path, max_tries=1, when_down="use_copy")
        assert (stale.outcome, stale.path.read_bytes()) == ("stale", BODY)

    def test_without_a_copy_there_is_nothing_to_use(self, tmp_path: Path):
        with pytest.raises(ServiceError, match=r"could not be fetched in 1 try: .*refused") as caught:
            got("http://127.0.0.1:9", tmp_path, max_tries=1, when_down="use_copy")
        assert "use_copy" not in str(caught.value)

    def test_a_wrong_answer_is_not_a_server_that_is_down(self, tmp_path: Path):
        answers = iter([with_etag(BODY), lambda _: Answer(404)])
        with serve(lambda asked: next(answers)(asked)) as server:
            got(server.url, tmp_path)
            with pytest.raises(ServiceError, match=r"answered 404"):
                got(server.url, tmp_path, when_down="use_copy")


class TestRetries:
    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_what_can_pass_is_tried_again(self, tmp_path: Path, status: int):
        with serve(in_turn(Answer(status), Answer(body=BODY))) as server:
            assert got(server.url, tmp_path).outcome == "new"
        assert len(server.asked) == 2

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 501])
    def test_what_cannot_pass_is_not(self, tmp_path: Path, status: int):
        with serve(lambda _: Answer(status)) as server, pytest.raises(ServiceError, match=f"answered {status}"):
            got(server.url, tmp_path)
        assert len(server.asked) == 1

    def test_there_is_an_end_to_it(self, tmp_path: Path):
        with (
            serve(lambda _: Answer(503)) as server,
            pytest.raises(ServiceError, match=r"in 3 tries: the server answered 503"),
        ):
            got(server.url, tmp_path)
        assert len(server.asked) == 3

    def test_a_cut_connection_is_tried_again(self, tmp_path: Path):
        with serve(in_turn(Answer(body=BODY, length=len(BODY) + 10), Answer(body=BODY))) as server:
            assert got(server.url, tmp_path).path.read_bytes() == BODY

    @pytest.mark.parametrize("kind", ["seconds", "date"])
    def test_the_server_says_how_long_to_wait(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
        waits: list[float] = []
        monkeypatch.setattr("tasks.ratings.fetching.time.sleep", waits.append)
        then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
        asked = "30" if kind == "seconds" else email.utils.format_datetime(then, usegmt=True)
        with serve(in_turn(Answer(429, headers={"Retry-After": asked}), Answer(body=BODY))) as server:
            got(server.url, tmp_path)
        assert waits == [pytest.approx(30, abs=2)]

    def test_a_wait_that_is_too_long_ends_the_run_and_says_so(self, tmp_path: Path):
        with (
            serve(lambda _: Answer(429, headers={"Retry-After": "3600"})) as server,
            pytest.raises(ServiceError, match=r"asks to come back in 3600 s .*run again then"),
        ):
            got(server.url, tmp_path)
        assert len(server.asked) == 1

    def test_waits_grow_and_are_never_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        waits: list[float] = []
        monkeypatch.setattr("tasks.ratings.fetching.time.sleep", waits.append)
        with serve(lambda _: Answer(500)) as server, pytest.raises(ServiceError):
            got(server.url, tmp_path, max_tries=40, backoff_seconds=1.0)
        assert all(0 <= wait <= min(2.0**number, 60) for number, wait in enumerate(waits))
        assert len(set(waits)) == len(waits) == 39
        assert max(waits[:3]) <= 4 < max(waits[6:])


class TestLimits:
    def test_an_announced_size_over_the_limit_is_refused_at_once(self, tmp_path: Path):
        with (
            serve(lambda _: Answer(body=b"", length=2_000_000)) as server,
            pytest.raises(ServiceError, match=r"larger than 1 MB; raise fetching.max_megabytes"),
        ):
            got(server.url, tmp_path, max_megabytes=1)

    def test_a_body_without_an_end_is_cut_off(self, tmp_path: Path):
        with serve(lambda _: Answer(body=endless)) as server, pytest.raises(ServiceError, match=r"larger than 1 MB"):
            got(server.url, tmp_path, max_megabytes=1)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0

    def test_a_body_that_trickles_does_not_hold_the_run_for_ever(self, tmp_path: Path):
        with (
            serve(lambda _: Answer(body=trickle)) as server,
            pytest.raises(ServiceError, match=r"not complete after 0.3 s"),
        ):
            got(server.url, tmp_path, total_seconds=0.3, max_tries=1)

    def test_a_silent_server_does_not_either(self, tmp_path: Path):
        def silent(_: Asked) -> Answer:
            import time

            time.sleep(1.0)
            return Answer()

        with serve(silent) as server, pytest.raises(ServiceError, match=r"timed out"):
            got(server.url, tmp_path, read_seconds=0.2, max_tries=1)

    def test_an_empty_body_is_no_file(self, tmp_path: Path):
        with serve(lambda _: Answer(body=b"")) as server, pytest.raises(ServiceError, match=r"is empty"):
            got(server.url, tmp_path)


class TestRedirects:
    def test_a_redirect_is_followed_and_remembered(self, tmp_path: Path):
        def script(asked: Asked) -> Answer:
            return Answer(body=BODY) if asked.path == "/there" else Answer(302, headers={"Location": "/there"})

        with serve(script) as server:
            fetched = got(server.url, tmp_path)
        assert (fetched.url, fetched.final_url) == (f"{server.url}/board.json", f"{server.url}/there")

    def test_circles_end(self, tmp_path: Path):
        with (
            serve(lambda _: Answer(302, headers={"Location": "/again"})) as server,
            pytest.raises(ServiceError, match=r"redirects more than 4 times"),
        ):
            got(server.url, tmp_path, max_redirects=4)
        assert len(server.asked) == 5

    @pytest.mark.parametrize(
        ("target", "message"),
        [("ftp://example.org/x", r"not an https address"), ("file:///etc/passwd", r"not an https address"), ("/board.pkl", r"is a pickle")],
    )  # fmt: skip
    def test_not_everywhere(self, tmp_path: Path, target: str, message: str):
        with (
            serve(lambda _: Answer(301, headers={"Location": target})) as server,
            pytest.raises(ServiceError, match=rf"redirects to an address that is refused: .*{message}"),
        ):
            got(server.url, tmp_path)

    def test_never_from_https_to_http(self):
        from tasks.ratings.fetching import _check_redirect

        for settings in (config(), config(allow_http=False)):
            with pytest.raises(ServiceError, match=r"not encrypted; this is refused"):
                _check_redirect("https://example.org/board.json", "http://example.org/board.json", settings)


class TestRefusals:
    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("http://example.org/board.json", r"not encrypted; use https, or set fetching.allow_http"),
            ("ftp://example.org/board.json", r"not an https address"),
            ("https:///board.json", r"not an https address"),
            ("https://example.org/elo_results_20240409.pkl", r"is a pickle: to open one runs whatever code"),
            ("https://example.org/a.PICKLE?download=1", r"is a pickle"),
            ("https://example.org/model.pt", r"is a pickle"),
        ],
    )
    def test_addresses_that_are_not_even_asked(self, url: str, message: str):
        with pytest.raises(ConfigError, match=message):
            check_url(url, FetchConfig())

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"<!DOCTYPE html><html>Sign in</html>", r"is a web page"),
            (b"\n  <html>", r"is a web page"),
            (b"\x80\x04\x95rest of a pickle", r"holds a pickle, whatever it is called"),
        ],
    )
    def test_bodies_that_are_no_data(self, tmp_path: Path, body: bytes, message: str):
        with serve(lambda _: Answer(body=body)) as server, pytest.raises(ServiceError, match=message):
            got(server.url, tmp_path)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("head", "name", "suffix"),
    [
        (b"PAR1....", "https://x/board", ".parquet"),
        (b'{"full": {"m": 1}}', "https://x/api?format=csv", ".json"),
        (b'\xef\xbb\xbf{"full": 1}', "https://x/board", ".json"),
        (b'[{"a": 1}]', "https://x/board", ".json"),
        (b'{"a": 1}\n{"a": 2}\n', "https://x/board", ".jsonl"),
        (b'{"a": 1}', "https://x/board.jsonl", ".jsonl"),
        (b'{\n "full": 1\n}', "https://x/board", ".json"),
        (b"rank,model\n1,a\n", "https://x/board", ".csv"),
    ],
)
def test_formats_are_told_by_content(head: bytes, name: str, suffix: str):
    assert suffix_of(head, name) == suffix


def test_errors_survive_the_way_between_processes():
    import pickle

    with pytest.raises(CharmError) as caught:
        check_url("http://x/y", FetchConfig())
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
