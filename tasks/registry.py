"""From a fine-tuned model to a released one: a plain folder with its evidence, a registered version, perhaps the champion."""

import shutil
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

import psutil
from pydantic import BaseModel, ConfigDict, Field, model_validator

from charm_core.errors import ArtifactError, ConfigError
from charm_core.promotion import GateConfig, RuleResult, Verdict, compare_with_champion
from charm_core.promotion_evidence import MeasuredChange
from tasks.caching import step
from tasks.evidence import Report
from tasks.model_registry import NOBODY, Action, ModelRegistry, ModelVersion, Move, RegisteredModel, split_version
from tasks.pages.report_data import ReportData
from tasks.promotion import AFTER, judge_report, verdict_markdown
from tasks.publishing import publish_markdown
from tasks.scoring import RewardModelRef
from tasks.scratch import scratch_folder
from tasks.store import MANIFEST, ArtifactRef, ArtifactStore
from tasks.tracking import TrackedRun, register_version, registered_version

EVIDENCE_TAG = "evidence"
RELEASED_TAG = "released"
GATE_TAG = "charm.gate"

_MEASURED_ON = ("ratings", "held out responses")
"""Inputs of a calibration that two versions must share to be compared."""


class PromotionConfig(BaseModel):
    """When a calibrated reward model becomes the champion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    promote: Literal["gate", "force", "never"] = Field(
        default="gate",
        description="gate: if the gate passes; force: in any case, which is recorded with the reason; never: only judge.",
    )
    reason: str = Field(default="", max_length=1000, description="Why; force needs one.")
    gate: GateConfig = Field(default=GateConfig(), description="What the gate demands.")

    @model_validator(mode="after")
    def _force_has_a_reason(self) -> Self:
        if self.promote == "force" and not self.reason.strip():
            raise ValueError("promote = 'force' needs a reason: it is kept with the model")
        return self


class Promotion(BaseModel):
    """What became of a version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    version: str
    verdict: Verdict = Field(description="With the rule about the champion that it met.")
    moved: bool = Field(description="Whether the alias moved to this version.")
    champion: str | None = Field(description="The version that is champion now.")
    sentence: str


@step(version=1)
def package_model(store: ArtifactStore, model: RewardModelRef, card: ArtifactRef) -> ArtifactRef:
    """The model's folder with its model card."""
    with model.local_spec(store) as spec, scratch_folder("release") as scratch:
        folder = scratch / "model"
        shutil.copytree(spec.path, folder, ignore=shutil.ignore_patterns(MANIFEST))
        Path(folder, "README.md").write_bytes(store.read_bytes(card))
        return store.write_folder(folder, "released_model")


def register_model(run: TrackedRun, store: ArtifactStore, name: str, released: ArtifactRef, report: Report) -> str:
    """Register a released model as a version in the MLflow registry; the same content is registered once.

    Returns:
        Its URI in the registry, such as ``models:/charm-demo/3``.
    """
    known = registered_version(run, name, released.digest)
    if known is not None:  # some gigabytes need not be read, checked and copied again
        return f"models:/{name}/{known}"
    with store.local_folder(released) as folder:
        source = run.log_folder(folder, "model")
    tags = {
        "digest": released.digest,
        "report": report.html.digest,
        "store_uri": released.uri,
        EVIDENCE_TAG: report.data.model_dump_json(),
        RELEASED_TAG: released.model_dump_json(),
    }
    return f"models:/{name}/{register_version(run, name, source, tags)}"


def judge_promotion(
    run: TrackedRun, store: ArtifactStore, version: str, report: ArtifactRef, config: PromotionConfig
) -> Promotion:
    """Judge a registered version, make it the champion if it deserves it or is forced, and publish the verdict.

    Args:
        run: The MLflow run to log to, whose server has the registry.
        store: Where reports are.
        version: Such as 'models:/charm-demo/3'.
        report: Its ReportData.
        config: When to promote.

    Raises:
        ConfigError: There is no such version.
        ServiceError: The registry does not answer, or somebody else moved the alias at the same time.
    """
    with run.registry() as client:
        promotion = settle_promotion(ModelRegistry.of(client), store, run.run_id, version, report, config)
    markdown = f"{promotion.sentence}\n\n{verdict_markdown(promotion.verdict)}"
    publish_markdown("promotion", markdown, f"Promotion of version {promotion.version} of {promotion.model}")
    run.log_text(markdown, "promotion.md")
    run.log_text(promotion.verdict.model_dump_json(indent=1), "verdict.json")
    run.tag({GATE_TAG: "passed" if promotion.verdict.passed else "not passed", "charm.promotion": promotion.sentence})
    return promotion


def settle_promotion(
    registry: ModelRegistry,
    store: ArtifactStore,
    run_id: str,
    version: str,
    report: ArtifactRef,
    config: PromotionConfig,
) -> Promotion:
    """Judge a version and move the alias; nothing is published.

    Raises:
        ConfigError: There is no such version.
        ServiceError: Somebody else moved the alias at the same time.
    """
    name, number = split_version(version)
    model = registry.model(name)
    candidate = model.version(number)
    data = store.read_record(report, ReportData)
    verdict = judge_report(data, config.gate).joined(_champion_rule(store, model, candidate, data, config.gate))
    held_back = "" if config.promote == "force" else _held_back(model, candidate, config)
    moved = model.champion != number and not held_back and (config.promote == "force" or verdict.passed)
    registry.tag_version(
        name, number, {GATE_TAG: "passed" if verdict.passed else "not passed", "charm.verdict": verdict.sentence()}
    )
    if moved:
        action: Action = "force" if config.promote == "force" else "promote"
        move = _move(model, number, action, config.reason, run_id, verdict.sentence())
        registry.move_champion(name, move)
    champion = number if moved else model.champion
    return Promotion(
        model=name,
        version=number,
        verdict=verdict,
        moved=moved,
        champion=champion,
        sentence=_sentence(model, number, verdict, config, held_back, moved=moved),
    )


def evidence_ref(version: ModelVersion) -> ArtifactRef:
    """The ReportData that a version was registered with.

    Raises:
        ConfigError: It was registered without.
    """
    return _tagged_ref(version, EVIDENCE_TAG)


def released_ref(version: ModelVersion) -> ArtifactRef:
    """The released folder of a version.

    Raises:
        ConfigError: It was registered without.
    """
    return _tagged_ref(version, RELEASED_TAG)


def roll_back(registry: ModelRegistry, name: str, reason: str, run_id: str, to: str | None = None) -> Move:
    """Make the champion before the present one champion again.

    Args:
        registry: Where.
        name: Of the registered model.
        reason: Why.
        run_id: MLflow run that does it.
        to: The version to go back to, if not the one before.

    Raises:
        ConfigError: There is none to go back to, it is the champion already, or the model has no champion.
        ServiceError: Somebody else moved the alias at the same time.
    """
    model = registry.model(name)
    target = model.version(to if to is not None else model.earlier()).version
    if target == model.champion:
        raise ConfigError(f"version {target} of {name} is the champion already; name another version to go back to")
    move = _move(model, target, "roll back", reason, run_id)
    registry.move_champion(name, move)
    return move


def withdraw(registry: ModelRegistry, name: str, reason: str, run_id: str) -> Move:
    """Leave a model without a champion, for a first champion that turns out to be bad.

    Raises:
        ConfigError: It has none.
        ServiceError: Somebody else moved the alias at the same time.
    """
    model = registry.model(name)
    if model.champion is None:
        raise ConfigError(f"{name} has no champion to withdraw")
    move = _move(model, NOBODY, "withdraw", reason, run_id)
    registry.move_champion(name, move)
    return move


def _champion_rule(
    store: ArtifactStore, model: RegisteredModel, candidate: ModelVersion, data: ReportData, config: GateConfig
) -> RuleResult:
    if model.champion is None:
        return compare_with_champion(None, "there is no champion yet", config)
    if model.champion == candidate.version:
        return compare_with_champion(None, "it is the champion", config)
    try:
        champion = store.read_record(evidence_ref(model.version(model.champion)), ReportData)
    except (ArtifactError, ConfigError) as error:
        return compare_with_champion(None, f"the evidence of version {model.champion} cannot be read: {error}", config)
    return compare_with_champion(*_beside(model.champion, champion, data), config)


def _beside(number: str, champion: ReportData, candidate: ReportData) -> tuple[MeasuredChange | None, str]:
    """Held-out mean |MD| of champion and candidate, or why they cannot be compared."""
    where = f"version {number}"
    if champion.reward_model != candidate.reward_model:
        return None, f"{where} is a calibration of {champion.reward_model}, not of {candidate.reward_model}"
    for name in _MEASURED_ON:
        digests = [
            {one.name: one.digest for one in data.provenance.digests}.get(name) for data in (champion, candidate)
        ]
        if digests[0] is None or digests[0] != digests[1]:
            return None, f"{where} was measured on other {name}"
    variants = [data.main.variant(AFTER) for data in (champion, candidate)]
    if champion.main.label != candidate.main.label or variants[0] is None or variants[1] is None:
        return None, f"{where} was not measured on {candidate.main.label}"
    before, after = (variant.mismatch.mean_absolute_mismatch for variant in variants if variant is not None)
    return MeasuredChange(what=f"{candidate.main.label}, against {where}", before=before, after=after), ""


def _held_back(model: RegisteredModel, candidate: ModelVersion, config: PromotionConfig) -> str:
    """Why the gate may not decide here, whatever its verdict; empty where it may."""
    number = candidate.version
    if config.promote == "never":
        return "promotion is switched off (promote = 'never')"
    about = [
        move
        for move in model.moves
        if move.after == number or (move.before == number and move.action in ("roll back", "withdraw"))
    ]
    if about and about[-1].before == number:
        return f"it was taken back ({about[-1].sentence()}); promote it by force if that is over"
    if model.champion is not None and int(number) < int(model.champion):
        return f"it is older than the champion, version {model.champion}; promote it by force or roll back"
    return ""


def _move(model: RegisteredModel, to: str, action: Action, reason: str, run_id: str, verdict: str = "") -> Move:
    return Move(
        at=datetime.now(UTC),
        action=action,
        before=model.champion or NOBODY,
        after=to,
        by=f"{psutil.Process().username()}@{socket.gethostname()}",
        reason=reason.strip(),
        verdict=verdict,
        run_id=run_id,
    )


def _sentence(
    model: RegisteredModel, number: str, verdict: Verdict, config: PromotionConfig, held_back: str, *, moved: bool
) -> str:
    judged = verdict.sentence()
    if moved:
        how = f"by force ({config.reason.strip()})" if config.promote == "force" else "by the gate"
        instead = f" instead of version {model.champion}" if model.champion else ""
        return f"Version {number} of {model.name} is the champion now, {how}{instead}; {judged}."
    if model.champion == number:
        return f"Version {number} of {model.name} is the champion already; {judged}."
    stays = f"version {model.champion} stays" if model.champion else "there is none"
    why = f"; {held_back}" if held_back else ""
    return f"Version {number} of {model.name} did not become the champion ({stays}): {judged}{why}."


def _tagged_ref(version: ModelVersion, tag: str) -> ArtifactRef:
    if tag not in version.tags:
        raise ConfigError(
            f"version {version.version} was registered without its {tag}, by an older CHARM; calibrate again"
        )
    return ArtifactRef.model_validate_json(version.tags[tag])
