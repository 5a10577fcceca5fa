"""Who is champion? Show it, judge a version again, promote by force with a reason, roll back, push to the hub.

python -m flows.promote                                                     all registered models
python -m flows.promote --model charm-demo                                  its versions, champion and history
python -m flows.promote --model charm-demo --version 3 --promote gate       judge it, and promote it if the gate passes
python -m flows.promote --model charm-demo --version 3 --promote force --reason "the benchmark is broken"
python -m flows.promote --model charm-demo --roll_back --reason "worse in use"
python -m flows.promote --model charm-demo --push.repository me/my-reward-model --push.dry_run false
"""

import sys
from collections.abc import Callable
from typing import Any, Literal, Self

from prefect import flow
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import CliImplicitFlag

from charm_core.errors import ConfigError
from charm_core.promotion import GateConfig
from flows.command_line import run_from_command_line
from flows.forms import Form
from flows.outcome import name_run
from flows.session import Session, check_services, open_session
from flows.settings import RuntimeSettings
from tasks.hub_push import HubConfig, push_version
from tasks.model_registry import ModelRegistry, Move, RegisteredModel
from tasks.pages.report_data import ReportData
from tasks.pages.report_text import aligned
from tasks.publishing import publish_markdown
from tasks.registry import GATE_TAG, PromotionConfig, evidence_ref, judge_promotion, roll_back, withdraw
from tasks.tracking import open_registry


class PromoteRun(Form):
    """Show who is champion, or change it: give at most one of promote, roll_back, withdraw and push.

    A calibration promotes its version by itself if the gate passes; this is for everything else.
    """

    model: str | None = Field(
        default=None, min_length=1, description="Name in the model registry; default: show all of them."
    )
    version: str | None = Field(
        default=None,
        pattern=r"^[1-9]\d*$",
        description="Its version; default: the champion, for promote the newest, for roll_back the champion before.",
    )
    promote: Literal["gate", "force"] | None = Field(
        default=None, description="gate: judge the version, promote it if it passes; force: promote it in any case."
    )
    roll_back: CliImplicitFlag[bool] = Field(
        default=False, description="Make the champion before the present one champion again."
    )
    withdraw: CliImplicitFlag[bool] = Field(default=False, description="Leave the model without a champion.")
    reason: str = Field(
        default="", max_length=1000, description="Why, kept with the model; needed by force, roll_back and withdraw."
    )
    gate: GateConfig | None = Field(
        default=None, description="What the gate demands; default: what it demanded when the version was made."
    )
    push: HubConfig | None = Field(
        default=None, description="Push the version to the Hugging Face hub; a dry run by default."
    )

    @model_validator(mode="after")
    def _one_thing_at_a_time(self) -> Self:
        asked = self.asked
        if len(asked) > 1:
            raise ValueError(f"give at most one of promote, roll_back, withdraw and push, not {list(asked)}")
        if asked and self.model is None:
            raise ValueError(f"{asked[0]} needs model, a name in the registry")
        needs_reason = self.promote == "force" or self.roll_back or self.withdraw
        if needs_reason and not self.reason.strip():
            raise ValueError(f"{asked[0]} needs a reason: it is kept with the model")
        if self.withdraw and self.version is not None:
            raise ValueError("withdraw is always about the champion; leave version out")
        return self

    @property
    def asked(self) -> tuple[str, ...]:
        """What is to be done; nothing is to show."""
        done = {
            "promote": self.promote is not None,
            "roll_back": self.roll_back,
            "withdraw": self.withdraw,
            "push": self.push is not None,
        }
        return tuple(name for name, wanted in done.items() if wanted)


PRESETS: dict[str, Callable[[], PromoteRun]] = {"show": PromoteRun}
SHOW = PromoteRun()
"""What a deployment runs if nothing else is asked for."""


class PromoteOutcome(BaseModel):
    """What was done."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    champion: str | None = Field(description="The version that is champion now; None as well where nothing was asked.")
    summary: str = Field(description="The result in a few lines.")


@flow(name="promote", flow_run_name="promote {run.model}")
def promote(run: PromoteRun = SHOW) -> PromoteOutcome:
    """Show or change who is champion of a registered model, or push a version to the hub; every change is recorded."""
    if run.model is None or not run.asked:
        state = show(run.model)
        publish_markdown("promote-champion", f"```\n{state}\n```", f"Champion of {run.model or 'every model'}")
        return PromoteOutcome(champion=None, summary=state)
    actions: dict[str, Callable[[Session, PromoteRun, str], str]] = {
        "promote": _promote,
        "roll_back": _roll_back,
        "withdraw": _withdraw,
        "push": _push,
    }
    with open_session("promote", run.model, run) as session:
        done = actions[run.asked[0]](session, run, run.model)
        model = _model(session, run.model)
        name_run(session, run.model, None, f"champion: {model.champion or 'nobody'}", page=None)
        state = describe_model(model)
        publish_markdown("promote-champion", f"{done}\n\n```\n{state}\n```", f"Champion of {run.model}")
        return PromoteOutcome(champion=model.champion, summary=f"{done}\n\n{state}\nMLflow   {session.run.url}")


def _promote(session: Session, run: PromoteRun, name: str) -> str:
    model = _model(session, name)
    if not model.versions:
        raise ConfigError(f"{name} has no version in the registry; calibrate first")
    version = model.version(run.version or model.versions[-1].version)
    evidence = evidence_ref(version)
    judged = session.store.read_record(evidence, ReportData).verdict
    gate = run.gate or (judged.config if judged else GateConfig())
    config = PromotionConfig(promote=run.promote or "gate", reason=run.reason, gate=gate)
    return judge_promotion(session.run, session.store, f"models:/{name}/{version.version}", evidence, config).sentence


def _roll_back(session: Session, run: PromoteRun, name: str) -> str:
    with session.run.registry() as client:
        return _recorded(
            session, roll_back(ModelRegistry.of(client), name, run.reason, session.run.run_id, run.version)
        )


def _withdraw(session: Session, run: PromoteRun, name: str) -> str:
    with session.run.registry() as client:
        return _recorded(session, withdraw(ModelRegistry.of(client), name, run.reason, session.run.run_id))


def _recorded(session: Session, move: Move) -> str:
    session.run.tag({"charm.promotion": move.sentence()})
    return move.sentence()


def _push(session: Session, run: PromoteRun, name: str) -> str:
    model = _model(session, name)
    number = run.version or model.champion
    if run.push is None or number is None:
        raise ConfigError(f"{name} has no champion to push; promote a version, or name one (version)")
    pushed = push_version(session.store, model, number, run.push)
    session.run.log_text(pushed.card, "model_card.md")
    session.run.log_text(pushed.model_dump_json(indent=1), "push.json")
    if pushed.commit is not None:
        with session.run.registry() as client:
            ModelRegistry.of(client).tag_version(name, number, {"charm.pushed": pushed.commit})
    return pushed.sentence()


def _model(session: Session, name: str) -> RegisteredModel:
    with session.run.registry() as client:
        return ModelRegistry.of(client).model(name)


def describe_model(model: RegisteredModel) -> str:
    """A registered model for a terminal: its champion, its versions and the moves."""
    champion = f"version {model.champion}" if model.champion else "nobody"
    rows = [
        [
            version.version,
            "champion" if version.version == model.champion else "",
            version.tags.get(GATE_TAG, "not judged"),
            version.tags.get("digest", "")[:12],
            version.tags.get("charm.pushed", ""),
        ]
        for version in reversed(model.versions)
    ]
    table = aligned([["version", "", "gate", "digest", "pushed"], *rows])
    moves = "".join(f"\n  {move.sentence()}" for move in reversed(model.moves)) or "\n  none"
    return f"{model.name}: the champion is {champion}  (models:/{model.name}@champion)\n\n{table}\n\nmoves, the latest first{moves}\n"


def describe_all(models: tuple[RegisteredModel, ...]) -> str:
    """All registered models for a terminal."""
    if not models:
        return "no model is registered; a calibration registers its model"
    rows: list[list[Any]] = [[model.name, model.champion or "nobody", str(len(model.versions))] for model in models]
    return aligned([["model", "champion", "versions"], *rows])


def show(name: str | None) -> str:
    """Who is champion: of one model with its history, or of all. Changes and records nothing."""
    with open_registry(RuntimeSettings().tracking()) as client:
        registry = ModelRegistry.of(client)
        if name is not None:
            return describe_model(registry.model(name))
        return describe_all(tuple(registry.model(one) for one in registry.names()))


def start(run: PromoteRun) -> PromoteOutcome | str:
    """Run the flow, or show what there is."""
    if not run.asked:
        return show(run.model)
    check_services()
    return promote(run)


if __name__ == "__main__":
    sys.exit(run_from_command_line("promote", PromoteRun, PRESETS, start))
