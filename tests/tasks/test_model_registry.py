"""Champions in a real MLflow registry: they move, are recorded, and can be rolled back."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from charm_core.errors import ConfigError, ServiceError
from tasks.model_registry import Action, ModelRegistry, Move, champions_in_turn, split_version
from tasks.registry import roll_back, withdraw
from tasks.tracking import open_registry
from tasks.tracking_settings import TrackingSettings

START = datetime(2026, 1, 1, tzinfo=UTC)


def move(before: str, after: str, action: Action = "promote", minute: int = 0) -> Move:
    return Move(at=START + timedelta(minutes=minute), action=action, before=before, after=after, by="me@here")


class TestChampionsInTurn:
    @pytest.mark.parametrize(
        ("moves", "champion", "line"),
        [
            ([], "", []),
            ([move("", "1")], "1", ["", "1"]),
            ([move("", "1"), move("1", "2"), move("2", "3", "force")], "3", ["", "1", "2", "3"]),
            # rolled back twice: the next time goes further back, not to and fro
            ([move("", "1"), move("1", "2"), move("2", "3"), move("3", "2", "roll back")], "2", ["", "1", "2"]),
            (
                [move("", "1"), move("1", "2"), move("2", "1", "roll back"), move("1", "3")],
                "3",
                ["", "1", "3"],
            ),
            # announced, but the process died before the alias moved
            ([move("", "1"), move("1", "2")], "1", ["", "1"]),
            ([move("", "1"), move("1", "2"), move("1", "3")], "3", ["", "1", "3"]),
            # an older one by force is a promotion like any other
            ([move("", "1"), move("1", "2"), move("2", "1", "force")], "1", ["", "1", "2", "1"]),
            (
                [move("", "1"), move("1", "2"), move("2", "1", "force"), move("1", "2", "roll back")],
                "2",
                ["", "1", "2"],
            ),
            ([move("", "1"), move("1", "", "withdraw"), move("", "2")], "2", ["", "1", "", "2"]),
            # back to a version that was never champion
            ([move("", "2"), move("2", "1", "roll back")], "1", ["", "2", "1"]),
            # somebody moved the alias by hand
            ([move("", "1"), move("4", "5")], "5", ["", "1", "4", "5"]),
            ([move("", "1")], "4", ["", "1"]),
        ],
    )
    def test_the_line_ends_with_the_champion(self, moves: list[Move], champion: str, line: list[str]):
        assert champions_in_turn(moves, champion) == line


@pytest.mark.parametrize("uri", ["charm-demo/3", "models:/charm-demo", "models:/charm-demo/latest", ""])
def test_what_is_no_version_is_refused(uri: str):
    with pytest.raises(ConfigError, match="no version of a registered model"):
        split_version(uri)


def test_a_version_is_name_and_number():
    assert split_version("models:/a/b/12") == ("a/b", "12")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrackingSettings:
    return TrackingSettings(uri=f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}")


@pytest.fixture(scope="module")
def client(settings: TrackingSettings) -> Any:
    """What anybody else uses."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)


@pytest.fixture
def registry(settings: TrackingSettings) -> Iterator[ModelRegistry]:
    with open_registry(settings) as client:
        yield ModelRegistry.of(client)


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return count()


@pytest.fixture
def name(client: Any, numbers: Iterator[int], tmp_path: Path) -> str:
    """A registered model with three versions and no champion."""
    found = f"model-{next(numbers)}"
    client.create_registered_model(found)
    for number in range(3):
        client.create_model_version(found, str(tmp_path), tags={"digest": str(number)})
    return found


class TestRegistry:
    def test_a_model_without_champion(self, registry: ModelRegistry, name: str):
        model = registry.model(name)
        assert (model.champion, model.moves) == (None, ())
        assert [version.version for version in model.versions] == ["1", "2", "3"]
        assert model.version("2").tags == {"digest": "1"}

    def test_names_that_do_not_exist_are_named(self, registry: ModelRegistry, name: str):
        with pytest.raises(ConfigError, match=rf"no model 'nobody' is registered: it has .*{name}"):
            registry.model("nobody")
        with pytest.raises(ConfigError, match=rf"{name} has no version '7' in the registry; it has \['1', '2', '3'\]"):
            registry.model(name).version("7")

    def test_moves_are_done_and_remembered(self, registry: ModelRegistry, name: str, client: Any):
        moves = [
            move("", "1"),
            move("1", "2", "force", 1).model_copy(update={"reason": "asked for", "verdict": "the gate does not pass"}),
            move("2", "3", minute=2),
        ]
        for one in moves:
            registry.move_champion(name, one)
        model = registry.model(name)
        assert (model.champion, list(model.moves)) == ("3", moves)
        assert moves[1].sentence() == (
            "2026-01-01 00:01:00 UTC  version 2 promoted by force by me@here: asked for; the gate does not pass"
        )
        # anybody can load it by its alias
        assert str(client.get_model_version_by_alias(name, "champion").version) == "3"

    def test_a_move_that_starts_from_somebody_else_is_refused_and_changes_nothing(
        self, registry: ModelRegistry, name: str
    ):
        registry.move_champion(name, move("", "1"))
        before = registry.model(name)
        with pytest.raises(ServiceError, match=rf"champion of {name} is version 1, not nobody as expected"):
            registry.move_champion(name, move("", "2", minute=1))
        assert registry.model(name) == before

    def test_roll_back_goes_back_step_by_step(self, registry: ModelRegistry, name: str):
        for number, (before, after) in enumerate([("", "1"), ("1", "2"), ("2", "3")]):
            registry.move_champion(name, move(before, after, minute=number))
        done = [roll_back(registry, name, "worse", "run") for _ in range(2)]
        assert [(one.before, one.after, one.action, one.reason) for one in done] == [
            ("3", "2", "roll back", "worse"),
            ("2", "1", "roll back", "worse"),
        ]
        model = registry.model(name)
        assert model.champion == "1"
        assert list(model.moves[-2:]) == done
        with pytest.raises(ConfigError, match="no earlier champion"):
            roll_back(registry, name, "worse", "run")
        assert registry.model(name) == model

    def test_roll_back_to_a_named_version(self, registry: ModelRegistry, name: str):
        registry.move_champion(name, move("", "3"))
        assert roll_back(registry, name, "", "run", to="1").after == "1"
        with pytest.raises(ConfigError, match=r"version 1 of .* is the champion already"):
            roll_back(registry, name, "", "run", to="1")
        with pytest.raises(ConfigError, match="has no version '9'"):
            roll_back(registry, name, "", "run", to="9")

    def test_a_version_that_is_gone_cannot_be_rolled_back_to(self, registry: ModelRegistry, name: str, client: Any):
        registry.move_champion(name, move("", "1"))
        registry.move_champion(name, move("1", "2", minute=1))
        client.delete_model_version(name, "1")
        with pytest.raises(ConfigError, match=r"has no version '1' in the registry; it has \['2', '3'\]"):
            roll_back(registry, name, "", "run")
        assert registry.model(name).champion == "2"

    def test_a_champion_of_unknown_origin_needs_a_name_to_go_back_to(
        self, registry: ModelRegistry, name: str, client: Any
    ):
        registry.move_champion(name, move("", "1"))
        client.set_registered_model_alias(name, "champion", "3")
        with pytest.raises(ConfigError, match=r"version 3 of .* became champion by other means"):
            roll_back(registry, name, "", "run")
        assert roll_back(registry, name, "", "run", to="1").before == "3"

    def test_withdraw_leaves_nobody_and_can_be_rolled_back(self, registry: ModelRegistry, name: str):
        with pytest.raises(ConfigError, match="has no champion to withdraw"):
            withdraw(registry, name, "bad", "run")
        registry.move_champion(name, move("", "2"))
        withdraw(registry, name, "bad", "run")
        assert registry.model(name).champion is None
        assert roll_back(registry, name, "not so bad", "run").after == "2"
        assert registry.model(name).champion == "2"
