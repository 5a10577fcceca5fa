"""How the registered reward models stand: who is champion, how old the ratings are that it was calibrated to, and what is due."""

import datetime

from pydantic import BaseModel, ConfigDict, Field

from charm_core.elo import present_ratings
from charm_core.errors import ArtifactError, ConfigError, RatingsError
from charm_core.rating_movement import RecalibrationRule, pair_movement
from charm_core.tables import RATINGS
from tasks.model_registry import ModelRegistry, ModelVersion, RegisteredModel
from tasks.pages.report_data import ReportData
from tasks.ratings.snapshots import KeptSnapshot, list_snapshots
from tasks.recalibration import Calibrated, calibrations
from tasks.registry import GATE_TAG, evidence_ref
from tasks.store import ArtifactStore


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Age(_Record):
    """How old the ratings are that a version was calibrated to, counted in snapshots."""

    board: str
    date: datetime.date | None = Field(description="Of the ratings.")
    snapshot: str
    newer: int = Field(description="Snapshots of the same board in the store that are of later dates.")
    newest: datetime.date | None = Field(description="Date of the last of them.")


class Standing(_Record):
    """One registered reward model."""

    model: str
    versions: int
    champion: str | None = Field(description="Its version; None for nobody.")
    since: datetime.datetime | None = Field(description="When it became champion, as far as CHARM did it.")
    evidence: str = Field(description="What the champion's calibration did, in one figure.")
    age: Age | None = Field(description="None where it is not known here to which ratings it was calibrated.")
    due: bool | None = Field(description="Whether something is to be done; None where that cannot be judged here.")
    why: str


def standings(registry: ModelRegistry, store: ArtifactStore, names: tuple[str, ...]) -> tuple[Standing, ...]:
    """How some registered models stand.

    Raises:
        ConfigError: There is none of that name.
        ServiceError: The registry does not answer.
    """
    kept = list_snapshots(store)
    return tuple(_standing(registry.model(name), store, kept) for name in names)


def _standing(model: RegisteredModel, store: ArtifactStore, kept: tuple[KeptSnapshot, ...]) -> Standing:
    champion = next((one for one in model.versions if one.version == model.champion), None)
    made = _made(store, model)
    newer = _newer(made, kept) if made else ()
    due, why = _due(store, model, made, newer)
    return Standing(
        model=model.name,
        versions=len(model.versions),
        champion=model.champion,
        since=next((move.at for move in reversed(model.moves) if champion and move.after == champion.version), None),
        evidence=_evidence(store, champion) if champion else "",
        age=_age(made, newer) if made else None,
        due=due,
        why=why,
    )


def _made(store: ArtifactStore, model: RegisteredModel) -> Calibrated | None:
    """The last calibration that made the champion; without a champion, the last one at all."""
    known = calibrations(store, model.name)
    return next((one for one in reversed(known) if model.champion in (None, one.version)), None)


def _newer(made: Calibrated, kept: tuple[KeptSnapshot, ...]) -> tuple[KeptSnapshot, ...]:
    return tuple(
        one for one in kept if one.snapshot.board == made.board and str(one.snapshot.date or "") > str(made.date or "")
    )  # by board and date, as they are listed


def _age(made: Calibrated, newer: tuple[KeptSnapshot, ...]) -> Age:
    return Age(
        board=made.board.shown(),
        date=made.date,
        snapshot=made.snapshot,
        newer=len(newer),
        newest=newer[-1].snapshot.date if newer else None,
    )


def _evidence(store: ArtifactStore, version: ModelVersion) -> str:
    try:
        data = store.read_record(evidence_ref(version), ReportData)
    except (ArtifactError, ConfigError) as error:
        return f"its evidence cannot be read: {error}"
    before, after = (data.main.variant(name) for name in ("untouched", "calibrated"))
    values = [one.mismatch.mean_absolute_mismatch.value for one in (before, after) if one is not None]
    if len(values) < 2 or None in values:
        return "not measured"
    return f"mean |MD| {values[0]:.3f} → {values[1]:.3f} on {data.main.label}{', simulated' if data.simulated else ''}"


def _due(
    store: ArtifactStore, model: RegisteredModel, made: Calibrated | None, newer: tuple[KeptSnapshot, ...]
) -> tuple[bool | None, str]:
    if model.champion is None:
        judged = model.versions[-1].tags.get(GATE_TAG, "not judged") if model.versions else "there is none"
        return True, (
            f"there is no champion (the gate on the newest version: {judged}); promote one with python -m flows.promote, or "
            f"calibrate otherwise"
        )
    if made is None:
        return None, "it is not known here to which snapshot it was calibrated"
    if not newer:
        return False, "there are no newer ratings of its board in the store"
    try:
        return _moved(store, made, newer[-1])
    except (ArtifactError, RatingsError) as error:
        return None, f"the ratings cannot be compared: {error}"


def _moved(store: ArtifactStore, made: Calibrated, last: KeptSnapshot) -> tuple[bool | None, str]:
    """Whether the win probabilities among its policy models moved, by the default rule."""
    old = next((one for one in list_snapshots(store) if one.digest == made.snapshot), None)
    if old is None:
        return None, f"the snapshot that it was calibrated to, {made.snapshot[:12]}, is not in the store"
    rated = [
        # under the board's own names: an alias file is known to the collection alone
        present_ratings(store.read_table(one.snapshot.ratings, RATINGS), made.policy_models, [], accept_near=())
        for one in (old, last)
    ]
    found = min(table.height for table in rated)
    if found < 2:
        return None, "the board calls its policy models by other names; python -m flows.collect_ratings judges that"
    pairs = pair_movement(rated[0], rated[1], RecalibrationRule())
    some = (
        f" (judged by {found} of its {len(made.policy_models)} policy models)"
        if found < len(made.policy_models)
        else ""
    )
    return pairs.due, f"since {made.date} {pairs.why}{some}"
