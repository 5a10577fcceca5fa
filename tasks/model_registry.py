"""The champion of a registered model: who it is, how it came about, and who was before.

The alias says who is champion now. Every move is also written to the registered model, before the alias moves, as a tag that is
never changed: what a process left undone when it died is known by the alias, and roll back goes through moves that were done.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ConfigError, ServiceError

CHAMPION = "champion"
NOBODY = ""
"""Stands for "no champion" in a move."""

Action = Literal["promote", "force", "roll back", "withdraw"]

_MOVE_TAG = "charm.move."
_READY = "READY"


class Move(BaseModel):
    """One move of the alias."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: datetime
    action: Action
    before: str = Field(description="Version that was champion; empty for none.")
    after: str = Field(description="Version that is champion from now on; empty for none.")
    by: str = Field(description="Account and machine.")
    reason: str = Field(default="", max_length=1000)
    verdict: str = Field(default="", description="The gate's verdict in one sentence.", max_length=1000)
    run_id: str = Field(default="", description="MLflow run that did it.")

    def sentence(self) -> str:
        """Who did what, when and why."""
        what = {
            "promote": f"version {self.after} promoted",
            "force": f"version {self.after} promoted by force",
            "roll back": f"rolled back from version {self.before} to {self.after}",
            "withdraw": f"version {self.before} withdrawn",
        }[self.action]
        why = "; ".join(filter(None, (self.reason, self.verdict)))
        return f"{self.at:%Y-%m-%d %H:%M:%S} UTC  {what} by {self.by}" + (f": {why}" if why else "")


class ModelVersion(BaseModel):
    """One version of a registered model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    tags: Mapping[str, str]
    run_id: str
    ready: bool


class RegisteredModel(BaseModel):
    """A registered model as it is now."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    champion: str | None
    versions: tuple[ModelVersion, ...] = Field(description="The oldest first.")
    moves: tuple[Move, ...] = Field(
        description="The oldest first; a move that was announced but never done is among them."
    )

    def version(self, number: str) -> ModelVersion:
        """One of the versions.

        Raises:
            ConfigError: There is no such version, or its files are not complete.
        """
        known = {one.version: one for one in self.versions}
        if number not in known:
            raise ConfigError(f"{self.name} has no version {number!r} in the registry; it has {list(known)}")
        if not known[number].ready:
            raise ConfigError(f"version {number} of {self.name} was not registered completely; calibrate again")
        return known[number]

    def earlier(self) -> str:
        """The version that roll back goes to.

        Raises:
            ConfigError: There is none.
        """
        line = champions_in_turn(self.moves, self.champion or NOBODY)
        if self.champion is not None and line[-1:] != [self.champion]:
            raise ConfigError(
                f"version {self.champion} of {self.name} became champion by other means than CHARM, so it is not known who was "
                f"before; name the version to go back to (version)"
            )
        earlier = [version for version in line[:-1] if version != NOBODY]  # for a time there may have been none
        if not earlier:
            raise ConfigError(
                f"{self.name} has no earlier champion to go back to; promote another version, or take the alias away (withdraw)"
            )
        return earlier[-1]


def champions_in_turn(moves: Sequence[Move], champion: str) -> list[str]:
    """Who was champion, each followed by its successor, without those from whom it was rolled back.

    Args:
        moves: The oldest first. One that was never done is known by the next one, which starts from somebody else.
        champion: Who it is now; empty for nobody.

    Returns:
        Versions, empty for nobody, the present champion last. It is missing where CHARM did not make it champion.
    """
    line: list[str] = []
    for move in moves:
        _back_to(line, move.before)
        if move.action == "roll back" and move.after in line:
            _back_to(line, move.after)
        elif line[-1:] != [move.after]:
            line.append(move.after)
    if champion in line:
        _back_to(line, champion)
    return line


def _back_to(line: list[str], version: str) -> None:
    """Shorten the line so that it ends with a version; append one that was made champion by other means."""
    if version in line:
        del line[len(line) - line[::-1].index(version) :]
    else:
        line.append(version)


class ModelRegistry:
    """MLflow's registry, as far as champions are concerned."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @classmethod
    def of(cls, client: Any) -> Self:
        """From what ``open_registry`` yields."""
        return cls(client)

    def names(self) -> tuple[str, ...]:
        """All registered models."""
        return tuple(sorted(model.name for model in _pages(self._client.search_registered_models)))

    def model(self, name: str) -> RegisteredModel:
        """One registered model.

        Raises:
            ConfigError: There is none of that name.
        """
        names = self.names()
        if name not in names:
            known = f"it has {list(names)}" if names else "it is empty"
            raise ConfigError(f"no model {name!r} is registered: {known}; a calibration registers its model")
        found = self._client.get_registered_model(name)
        champion = found.aliases.get(CHAMPION)
        versions = _pages(self._client.search_model_versions, filter_string=f"name = '{name}'")
        return RegisteredModel(
            name=name,
            champion=None if champion is None else str(champion),
            versions=tuple(sorted(map(_version, versions), key=lambda one: int(one.version))),
            moves=tuple(_moves(found.tags)),
        )

    def move_champion(self, name: str, move: Move) -> None:
        """Write the move down, then make it.

        Raises:
            ServiceError: Somebody else moved the alias since the move was decided, or at the same time.
        """
        self._expect(name, move.before)
        # sorts by time, and no two processes write the same tag
        key = f"{_MOVE_TAG}{move.at.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}.{move.run_id[:8]}"
        self._client.set_registered_model_tag(name, key, move.model_dump_json())
        if move.after == NOBODY:
            self._client.delete_registered_model_alias(name, CHAMPION)
        else:
            self._client.set_registered_model_alias(name, CHAMPION, move.after)
        self._expect(name, move.after)

    def tag_version(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            self._client.set_model_version_tag(name, version, key, value)

    def _expect(self, name: str, version: str) -> None:
        found = self._client.get_registered_model(name).aliases.get(CHAMPION)
        now = NOBODY if found is None else str(found)
        if now != version:
            raise ServiceError(
                f"the champion of {name} is {f'version {now}' if now else 'nobody'}, not {f'version {version}' if version else 'nobody'} "
                f"as expected: somebody else moved it at the same time; look at the champion and run again"
            )


def _pages(search: Any, **query: Any) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = search(**query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _version(found: Any) -> ModelVersion:
    return ModelVersion(
        version=str(found.version), tags=dict(found.tags), run_id=found.run_id or "", ready=found.status == _READY
    )


def _moves(tags: Mapping[str, str]) -> Iterator[Move]:
    for key in sorted(tags):
        if key.startswith(_MOVE_TAG):
            yield Move.model_validate_json(tags[key])


def split_version(uri: str) -> tuple[str, str]:
    """Name and version of 'models:/name/3'.

    Raises:
        ConfigError: It is none of that form.
    """
    found = re.fullmatch(r"models:/(.+)/(\d+)", uri)
    if found is None:
        raise ConfigError(f"{uri!r} is no version of a registered model; give one such as 'models:/charm-demo/3'")
    return found[1], found[2]
