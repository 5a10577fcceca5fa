"""The recipes of the effect report, as changes of one calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flows.runs import AblationRun, CalibrationRun

Kind = Literal["untouched", "offsets", "length_regression", "control", "trained"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One recipe."""

    name: str
    kind: Kind
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Section of the calibration to the settings that differ."""
    style_controlled: bool = False
    """Whether it is corrected towards the style-controlled board; it is judged against the calibration's own."""

    def applied(self, run: CalibrationRun) -> CalibrationRun:
        """The calibration with this cell's settings, validated as if they had been given."""
        document = run.model_dump(exclude_unset=True)
        for section, settings in self.changes.items():
            document[section] = {**document.get(section, {}), **settings}
        return CalibrationRun.model_validate(document)


def cells_of(run: AblationRun) -> list[Cell]:
    """All recipes that the settings ask for, in the order in which they are shown."""
    return [*_fixed(run), *_sizes(run)]


def compared_cells(run: AblationRun) -> tuple[str, ...]:
    """Names of the recipes of which the best is sought; the others are less of the same."""
    return tuple(cell.name for cell in _fixed(run))


def skipped_cells(run: AblationRun) -> tuple[str, ...]:
    """What is left out, and why, in sentences."""
    if run.style_control and run.calibration.simulation is not None:
        return ("Style-controlled ratings: the simulated arena has no such board.",)
    return ()


def _fixed(run: AblationRun) -> list[Cell]:
    pairwise = _without_win_rate_settings(run.calibration)
    cells = [
        Cell(name="no calibration", kind="untouched"),
        Cell(name="control, δ = 0", kind="control"),
        Cell(name="length regression, post hoc", kind="length_regression"),
        Cell(name="offsets at inference only", kind="offsets"),
        Cell(
            name="Bradley-Terry, cross-prompt offsets (the reference)",
            kind="trained",
            changes={
                "calibration": {"estimator": "cross_prompt"},
                "training": {**pairwise, "objective": "bradley_terry"},
            },
        ),
        Cell(name="Bradley-Terry", kind="trained", changes={"training": {**pairwise, "objective": "bradley_terry"}}),
        Cell(
            name="margin regression",
            kind="trained",
            changes={"training": {**pairwise, "objective": "margin_regression"}},
        ),
        Cell(name="win-rate matching", kind="trained", changes={"training": {"objective": "win_rate_matching"}}),
    ]
    if run.style_control and run.calibration.simulation is None:
        cells.append(Cell(name="style-controlled Elo", kind="trained", style_controlled=True))
    return cells


def _sizes(run: AblationRun) -> list[Cell]:
    sided = {"strategy": "overvalued_vs_reference"}
    return [
        *(
            Cell(
                name=f"{count} overvalued {_models(count)}",
                kind="trained",
                changes={"selection": {"max_overvalued": count}, "preferences": sided},
            )
            for count in run.overvalued
        ),
        *(
            Cell(
                name=f"{count} reference {_models(count)}",
                kind="trained",
                changes={"selection": {"auto_references": count}, "preferences": sided},
            )
            for count in run.references
        ),
        *(
            Cell(name=f"{count:,} pairs", kind="trained", changes={"preferences": {"max_pairs": count}})
            for count in run.pairs
        ),
    ]


def _without_win_rate_settings(run: CalibrationRun) -> dict[str, Any]:
    """Settings that only win_rate_matching knows, back at their defaults: they would be a difference that is none."""
    fields = type(run.training).model_fields
    own: Sequence[str] = ("win_rate_temperature", "win_rate_memory", "regression_weight")
    return {name: fields[name].default for name in own}


def _models(count: int) -> str:
    return "policy model" if count == 1 else "policy models"
