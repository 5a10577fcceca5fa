"""Which policy models are overvalued enough to correct, which one to hold them against, and why."""

from typing import Literal

from pydantic import Field, field_validator

from charm_core.comparison_graph import name_models
from charm_core.errors import ConfigError
from charm_core.mismatch import MismatchReport, ModelMismatch
from charm_core.records import Record


class SelectionConfig(Record):
    """Which models take part in the correction."""

    overvalued: tuple[str, ...] | Literal["auto"] = Field(
        "auto", description="Overvalued policy models; 'auto' takes those whose overvaluation is significant."
    )
    references: tuple[str, ...] | Literal["auto"] = Field(
        "auto", description="Reference policy models; 'auto' takes the best-supported neutral ones."
    )
    max_overvalued: int | None = Field(None, ge=1, description="auto: at most so many, the largest first.")
    auto_references: int = Field(1, ge=1, description="auto: so many references, if there are as many neutral models.")

    @field_validator("overvalued", "references", mode="before")
    @classmethod
    def _auto_is_a_word(cls, value: object) -> object:
        # a command line cannot tell the word from a list of one name
        return "auto" if value in (["auto"], ("auto",)) else value


class ModelChoice(Record):
    """One chosen model."""

    policy_model: str
    reason: str


class Selection(Record):
    """The models that take part in the correction."""

    overvalued: tuple[ModelChoice, ...]
    references: tuple[ModelChoice, ...]
    note: str = ""

    @property
    def overvalued_models(self) -> tuple[str, ...]:
        """Names only."""
        return tuple(choice.policy_model for choice in self.overvalued)

    @property
    def reference_models(self) -> tuple[str, ...]:
        """Names only."""
        return tuple(choice.policy_model for choice in self.references)


def select_models(report: MismatchReport, config: SelectionConfig | None = None) -> Selection:
    """Choose overvalued and reference models from a mismatch report.

    Automatically: overvalued are the flagged models with a positive overvaluation, largest first; the references are, of
    the models that are not flagged, those whose overvaluation intervals reach least far from 0. That asks for both
    a small overvaluation and a well-supported one: a model that only has too few prompts or votes to be flagged has a
    wide interval.

    Returns:
        The choice; no overvalued model, with a note, where none is significant.

    Raises:
        ConfigError: A named model is not in the report, or is on both sides, or no model is left as a reference.
    """
    settings = config or SelectionConfig()
    by_name = {model.policy_model: model for model in report.models}
    overvalued = _named(settings.overvalued, by_name, "overvalued")
    references = _named(settings.references, by_name, "reference")
    if overvalued is None:
        excluded = {choice.policy_model for choice in references or ()}
        overvalued = _automatic_overvalued(report, settings, excluded)
    if references is None:
        references = _automatic_references(
            report, {choice.policy_model for choice in overvalued}, settings.auto_references
        )
    both = sorted({choice.policy_model for choice in overvalued} & {choice.policy_model for choice in references})
    if both:
        raise ConfigError(f"{name_models(both)} cannot be both overvalued and reference models; name each on one side")
    note = "" if overvalued else "no policy model is significantly overvalued: there is nothing to correct"
    return Selection(overvalued=overvalued, references=references, note=note)


def _named(
    names: tuple[str, ...] | Literal["auto"], by_name: dict[str, ModelMismatch], side: str
) -> tuple[ModelChoice, ...] | None:
    if names == "auto":
        return None
    if not names:
        raise ConfigError(f"the list of {side} models is empty; name at least one or say 'auto'")
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ConfigError(
            f"the {side} models {name_models(unknown)} have no scores; choose from {name_models(sorted(by_name))}"
        )
    return tuple(
        ModelChoice(policy_model=name, reason=f"named in the configuration; {_measured(by_name[name])}")
        for name in dict.fromkeys(names)
    )


def _automatic_overvalued(
    report: MismatchReport, config: SelectionConfig, excluded: set[str]
) -> tuple[ModelChoice, ...]:
    flagged = [
        model for model in report.models if model.flagged and _signed(model) > 0 and model.policy_model not in excluded
    ]
    ordered = sorted(flagged, key=lambda model: (-_signed(model), model.policy_model))
    return tuple(
        ModelChoice(
            policy_model=model.policy_model,
            reason=f"significantly overvalued: {_measured(model)}, Holm-corrected p = {model.p_value_holm:.2g}",
        )
        for model in ordered[: config.max_overvalued]
    )


def _automatic_references(report: MismatchReport, excluded: set[str], count: int) -> tuple[ModelChoice, ...]:
    candidates = [model for model in report.models if model.policy_model not in excluded]
    neutral = [model for model in candidates if not model.flagged]
    if not candidates:
        raise ConfigError(
            "every policy model is named as overvalued, so none is left as a reference; name fewer or add a model"
        )
    surest = sorted(neutral or candidates, key=lambda model: (_farthest(model), -model.prompts, model.policy_model))
    which = (
        f"of the {len(neutral)} models without significant mismatch, "
        f"{'the one' if count == 1 else f'one of the {count}'} surest to be near 0"
        if neutral
        else "every other model has a significant mismatch too; this one has the smallest"
    )
    # without a neutral model one is bad enough
    chosen = surest[: count if neutral else 1]
    return tuple(
        ModelChoice(policy_model=model.policy_model, reason=f"{which}: {_measured(model)}") for model in chosen
    )


def _signed(model: ModelMismatch) -> float:
    # a model that wins every comparison has no finite overvaluation and precedes all others
    if model.overvaluation.value is not None:
        return model.overvaluation.value
    return float("inf") if (model.mismatch_degree.value or 0.0) > 0 else float("-inf")


def _farthest(model: ModelMismatch) -> float:
    interval = model.overvaluation
    if interval.value is None or interval.low is None or interval.high is None:
        return float("inf")
    return max(abs(interval.low), abs(interval.high), abs(interval.value))


def _measured(model: ModelMismatch) -> str:
    interval = model.overvaluation
    if interval.value is None:
        return f"{model.note} ({model.prompts} prompts)"
    measured = f"{interval.value:+.0f} Elo points"
    if interval.low is not None and interval.high is not None:
        measured += f" [{interval.low:+.0f}, {interval.high:+.0f}]"
    return f"{measured} on {model.prompts} prompts"
