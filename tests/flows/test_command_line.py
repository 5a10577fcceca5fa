"""The command line: one settings model is the form, the file and the options."""

import datetime
import json
import logging
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ArtifactError
from flows.command_line import run_from_command_line, settings_toml


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float = Field(default=0.5, gt=0, lt=1, description="A 95 % rate, or 50%.")
    names: tuple[str, ...] = Field(default=(), description="Some names.")
    limit: int | None = Field(default=None, ge=1, description="At most so many.")
    key: str | None = Field(default="id", description="A column; none: made up.")
    day: datetime.date | None = Field(default=None, description="A day.")
    where: dict[str, str] = Field(default={}, description="Rows to keep.")
    kind: Literal["fast", "slow"] = Field(default="fast", description="How.")
    ranks: int | Literal["auto"] = Field(default="auto", description="How many.")
    flag: bool = Field(default=False, description="Whether.")


class Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    limit: int | None = 3


class Settings(BaseModel):
    """What this flow is for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field(description="What it is called.")
    part: Part = Field(default=Part(), description="A part.")
    other: Part | None = Field(default=None, description="A part that can be absent.")
    entries: tuple[Entry, ...] = Field(default=(), description="A list of tables.")


PRESETS: dict[str, Callable[[], Settings]] = {
    "small": lambda: Settings(title="small", part=Part(rate=0.25, names=("a", "b"), limit=7)),
    "big": lambda: Settings(title="big", other=Part(rate=0.75)),
}


class Outcome(BaseModel):
    """What a command line led to."""

    status: int
    run: Settings | None = None
    out: str
    err: str


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    def call(*arguments: str, presets: dict[str, Callable[[], Settings]] | None = None) -> Outcome:
        runs: list[Settings] = []

        def start(run: Settings) -> str:
            runs.append(run)
            return "all done"

        try:
            status = run_from_command_line("audit", Settings, PRESETS if presets is None else presets, start, arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(status=status, run=runs[0] if runs else None, out=captured.out, err=captured.err)

    return call


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str | bytes], str]:
    def write(content: str | bytes) -> str:
        path = tmp_path / "config.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


class TestPrecedence:
    def test_the_first_preset_is_the_default_and_the_summary_is_printed(self, invoke: Invoke):
        outcome = invoke()
        assert (outcome.status, outcome.out, outcome.run) == (0, "all done\n", PRESETS["small"]())

    def test_a_preset_by_name(self, invoke: Invoke):
        assert invoke("--preset", "big").run == PRESETS["big"]()

    def test_an_option_beats_the_preset_and_leaves_the_rest(self, invoke: Invoke):
        run = invoke("--part.rate", "0.9", "--preset", "small").run
        assert run == Settings(title="small", part=Part(rate=0.9, names=("a", "b"), limit=7))

    def test_an_option_beats_the_file_and_the_file_beats_the_default(
        self, invoke: Invoke, config: Callable[[str], str]
    ):
        path = config('title = "file"\n[part]\nrate = 0.1\nkind = "slow"\nday = 2025-02-28\n')
        run = invoke("--config", path, "--part.rate", "0.2").run
        assert run == Settings(title="file", part=Part(rate=0.2, kind="slow", day=datetime.date(2025, 2, 28)))

    def test_a_file_is_not_mixed_with_a_preset(self, invoke: Invoke, config: Callable[[str], str]):
        assert invoke("--config", config('title = "file"\n')).run == Settings(title="file")
        both = invoke("--config", config('title = "file"\n'), "--preset", "big")
        assert (both.status, both.run) == (2, None)
        assert "not allowed with argument" in both.err

    def test_an_option_can_take_back_what_a_preset_says(self, invoke: Invoke):
        run = invoke("--part.limit", "None", "--part.names", "[]", "--part.key", "None").run
        assert run is not None
        assert (run.part.limit, run.part.names, run.part.key) == (None, (), None)

    @pytest.mark.parametrize(
        ("arguments", "field", "value"),
        [
            (["--part.names", "x", "--part.names", "y"], "names", ("x", "y")),
            (["--part.names", '["x,y", "z w"]'], "names", ("x,y", "z w")),
            (["--part.where", "a=b"], "where", {"a": "b"}),
            (["--part.where", '{"a b": "c=d"}'], "where", {"a b": "c=d"}),
            (["--part.day", "2025-02-28"], "day", datetime.date(2025, 2, 28)),
            (["--part.kind", "slow"], "kind", "slow"),
            (["--part.ranks", "4"], "ranks", 4),
            (["--part.ranks", "auto"], "ranks", "auto"),
            (["--part.flag", "true"], "flag", True),
            (["--part.limit=3"], "limit", 3),
        ],
    )
    def test_values_of_every_type(self, invoke: Invoke, arguments: list[str], field: str, value: object):
        outcome = invoke(*arguments)
        assert outcome.run is not None, outcome.err
        assert getattr(outcome.run.part, field) == value

    def test_one_option_of_an_absent_part_makes_it(self, invoke: Invoke):
        run = invoke("--other.rate", "0.3").run
        assert run is not None
        assert run.other == Part(rate=0.3)

    def test_tables_in_lists(self, invoke: Invoke, config: Callable[[str], str]):
        text = 'title = "x"\n[[entries]]\nname = "a"\n[[entries]]\nname = "b"\nlimit = "None"\n'
        run = invoke("--config", config(text)).run
        assert run is not None
        assert run.entries == (Entry(name="a"), Entry(name="b", limit=None))

    def test_the_environment_has_no_say(self, invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
        for name in (
            "TITLE",
            "title",
            "PART",
            "PART__RATE",
            "part.rate",
            "OTHER",
            "CONFIG",
            "PRESET",
            "ENTRIES",
            "RATE",
        ):
            monkeypatch.setenv(name, '{"rate": 0.99}')
        assert invoke().run == PRESETS["small"]()


class TestShowConfig:
    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["--preset", "big"],
            ["--part.key", "None", "--part.limit", "None", "--part.names", "[]"],
            ["--part.day", "2025-02-28", "--part.where", '{"a.b [c]": "d\\"e"}', "--other.ranks", "2"],
            ["--entries", '[{"name": "ü", "limit": null}, {"name": "b"}]', "--title", 'quote " and \\ and\nline'],
        ],
    )
    def test_what_it_prints_is_read_back_to_the_same(
        self, invoke: Invoke, config: Callable[[str], str], arguments: list[str]
    ):
        shown = invoke(*arguments, "--show-config")
        assert (shown.status, shown.run) == (0, None)
        direct, read_back = invoke(*arguments).run, invoke("--config", config(shown.out)).run
        assert direct is not None
        assert read_back == direct
        assert invoke("--config", config(shown.out), "--show-config").out == shown.out

    def test_it_shows_defaults_too(self, invoke: Invoke):
        shown = tomllib.loads(invoke("--show-config").out)
        assert shown["part"]["kind"] == "fast"
        assert shown["part"]["day"] == "None"

    def test_wrong_settings_are_not_shown(self, invoke: Invoke):
        outcome = invoke("--show-config", "--part.rate", "7")
        assert (outcome.status, outcome.out) == (2, "")

    def test_the_text_of_a_record_is_toml(self):
        assert tomllib.loads(settings_toml(Entry(name="a"))) == {"name": "a", "limit": 3}


class TestHelp:
    def test_it_lists_every_field_with_meaning_and_default(self, invoke: Invoke):
        outcome = invoke("--help")
        text = " ".join(outcome.out.split())
        assert outcome.status == 0
        assert "usage: python -m flows.audit" in text
        assert "What this flow is for." in text
        assert "--title str What it is called. (required)" in text
        assert "A 95 % rate, or 50%. (default: 0.5)" in text
        assert "--part.kind {fast,slow} How. (default: fast)" in text
        assert "{small,big}" in text
        assert "(default: small)" in text
        for field in Part.model_fields:
            assert f"--part.{field} " in text
            assert f"--other.{field} " in text


class TestWrongInput:
    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["--part.rate", "7"], ["part.rate", "less than 1", "'7'"]),
            (["--part.rate", "much"], ["part.rate", "'much'"]),
            (["--part.limit", "0"], ["part.limit", "greater than or equal to 1", "'0'"]),
            (["--part.kind", "medium"], ["part.kind", "'fast' or 'slow'", "'medium'"]),
            (["--part.day", "28.2.2025"], ["part.day", "'28.2.2025'"]),
            (["--part.rate", "7", "--part.limit", "0"], ["part.rate", "part.limit"]),
            (["--nope", "1"], ["unrecognized arguments: --nope 1"]),
            (["--part.nope", "1"], ["unrecognized arguments: --part.nope 1"]),
            (["--part.rat", "0.3"], ["unrecognized arguments: --part.rat 0.3"]),
            (["--show"], ["unrecognized arguments: --show"]),
            (["stray"], ["unrecognized arguments: stray"]),
            (["--part.rate"], ["--part.rate", "expected one argument"]),
            (["--preset", "huge"], ["--preset", "'huge'", "small"]),
            (["--config", "nowhere.toml"], ["cannot read the settings file nowhere.toml", "No such file"]),
            (["--config", "."], ["cannot read the settings file .", "Is a directory"]),
        ],
    )
    def test_options(self, invoke: Invoke, arguments: list[str], parts: list[str]):
        outcome = invoke(*arguments)
        assert (outcome.status, outcome.run, outcome.out) == (2, None, "")
        for part in parts:
            assert part in outcome.err

    @pytest.mark.parametrize(
        ("content", "parts"),
        [
            ("title = ", ["is not TOML", "config.toml"]),
            (b"\xff\xfe", ["is not TOML"]),
            ("", ["title", "Field required"]),
            ('title = "x"\nparts = 3\n', ["parts", "Extra inputs", "3"]),
            ('title = "x"\n[part]\nrates = 0.5\n', ["part.rates", "Extra inputs", "0.5"]),
            ('title = "x"\npart = 3\n', ["part", "3"]),
            ('title = "x"\n[[entries]]\nnames = "a"\n', ["entries.0.name", "Field required"]),
            ('title = "None"\n', ["title", "None"]),
        ],
    )
    def test_files(self, invoke: Invoke, config: Callable[[str | bytes], str], content: str | bytes, parts: list[str]):
        outcome = invoke("--config", config(content))
        assert (outcome.status, outcome.run) == (2, None)
        for part in parts:
            assert part in outcome.err

    def test_nothing_to_start_from(self, invoke: Invoke):
        outcome = invoke(presets={})
        assert (outcome.status, outcome.run) == (2, None)
        assert "title: Field required" in outcome.err


class TestOutcome:
    def status(self, error: BaseException) -> int:
        def start(run: Settings) -> str:
            raise error

        return run_from_command_line("audit", Settings, PRESETS, start, [])

    def test_an_error_of_ours_is_one_line(self, capsys: pytest.CaptureFixture[str]):
        assert self.status(ArtifactError("no space; free some")) == 1
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", "error: no space; free some\n")

    def test_any_other_error_is_logged_with_where_it_was(self, caplog: pytest.LogCaptureFixture):
        assert self.status(ZeroDivisionError("odd")) == 1
        assert "ZeroDivisionError: odd" in caplog.text

    def test_ctrl_c(self, capsys: pytest.CaptureFixture[str]):
        assert self.status(KeyboardInterrupt()) == 130
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "finished steps are kept" in captured.err

    def test_told_to_exit(self):
        with pytest.raises(SystemExit):
            self.status(SystemExit(5))


def literal_choices(model: type[BaseModel]) -> dict[str, Any]:
    """Every choice in a settings model and the models below it, by dotted field name."""
    from typing import get_args

    found: dict[str, Any] = {}

    def visit(annotation: Any, name: str) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for field, info in annotation.model_fields.items():
                visit(info.annotation, f"{name}.{field}")
        elif getattr(annotation, "__origin__", None) is Literal:
            found[name] = get_args(annotation)
        else:
            for argument in get_args(annotation):
                visit(argument, name)

    visit(model, model.__name__)
    return found


def test_every_choice_of_the_training_settings_can_be_given_on_the_command_line():
    # options are text: a choice of numbers would never match
    from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig

    choices = literal_choices(TrainingConfig) | literal_choices(RewardModelSpec)
    assert "TrainingConfig.objective" in choices
    assert all(isinstance(choice, str) for options in choices.values() for choice in options)


def test_the_arguments_of_the_process_are_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["audit", "--preset", "big", "--show-config"])
    assert run_from_command_line("audit", Settings, PRESETS, lambda run: "", None) == 0
    assert 'title = "big"' in capsys.readouterr().out
    assert os.environ.get("TITLE") is None


class Result(BaseModel):
    """What a flow returns."""

    champion: str
    summary: str


class TestJson:
    def object_of(self, capsys: pytest.CaptureFixture[str], *arguments: str, start: Any = None) -> tuple[int, Any]:
        """Exit status and the one object on standard output."""

        def usual(run: Settings) -> Result:
            sys.stdout.write("a library that prints\n")
            return Result(champion="3", summary="all\ndone")

        status = run_from_command_line("audit", Settings, PRESETS, start or usual, ["--json", *arguments])
        return status, json.loads(capsys.readouterr().out)

    def test_the_outcome_and_nothing_else(self, capsys: pytest.CaptureFixture[str]):
        outcome = {"champion": "3", "summary": "all\ndone"}
        assert self.object_of(capsys) == (0, {"flow": "audit", "exit_status": 0, "outcome": outcome})

    def test_only_text(self, capsys: pytest.CaptureFixture[str]):
        status, found = self.object_of(capsys, start=lambda run: "nobody")
        assert (status, found["outcome"]) == (0, {"summary": "nobody"})

    @pytest.mark.parametrize(
        ("error", "status", "told"),
        [
            (ArtifactError("no space; free some"), 1, {"kind": "ArtifactError", "message": "no space; free some"}),
            (ZeroDivisionError("odd"), 1, {"kind": "ZeroDivisionError", "message": "odd"}),
        ],
    )
    def test_an_error(self, capsys: pytest.CaptureFixture[str], error: Exception, status: int, told: dict[str, str]):
        def start(run: Settings) -> str:
            raise error

        assert self.object_of(capsys, start=start) == (status, {"flow": "audit", "exit_status": status, "error": told})

    def test_ctrl_c(self, capsys: pytest.CaptureFixture[str]):
        def start(run: Settings) -> str:
            raise KeyboardInterrupt

        status, found = self.object_of(capsys, start=start)
        assert (status, found["error"]["kind"]) == (130, "Interrupted")
        assert "run the same command" in found["error"]["message"]

    @pytest.mark.parametrize("arguments", [["--part.rate", "7"], ["--nope", "1"], ["--preset", "huge"]])
    def test_wrong_settings(self, capsys: pytest.CaptureFixture[str], arguments: list[str]):
        status, found = self.object_of(capsys, *arguments)
        assert (status, found["exit_status"], found["error"]["kind"]) == (2, 2, "ConfigError")
        assert arguments[-1] in found["error"]["message"]

    def test_the_settings(self, capsys: pytest.CaptureFixture[str]):
        status, found = self.object_of(capsys, "--show-config", "--title", "x")
        assert status == 0
        assert Settings.model_validate(found["settings"]).title == "x"


def test_a_wrong_option_is_one_line_and_not_the_list_of_all_options(invoke: Invoke):
    outcome = invoke("--nope", "1")
    assert outcome.err == "error: unrecognized arguments: --nope 1; see --help\n"


@pytest.mark.parametrize(("option", "shown"), [([], False), (["--verbose"], True)])
def test_details_are_for_those_who_ask(
    prefect_session: None, capsys: pytest.CaptureFixture[str], option: list[str], shown: bool
):
    from prefect.logging.configuration import setup_logging

    def start(run: Settings) -> str:
        logging.getLogger("prefect.flow_runs").info("a detail")
        return "done"

    setup_logging(incremental=False)  # its handlers write to the standard error of the moment when they were made
    try:
        assert run_from_command_line("audit", Settings, PRESETS, start, option) == 0
    finally:
        captured = capsys.readouterr()
        setup_logging(incremental=False)
    assert ("a detail" in captured.err) is shown
    assert captured.out == "done\n"
