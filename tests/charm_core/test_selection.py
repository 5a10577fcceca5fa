import pytest

from charm_core.errors import ConfigError
from charm_core.mismatch import MismatchConfig, MismatchReport, ModelMismatch
from charm_core.records import Estimate
from charm_core.selection import SelectionConfig, select_models


def _model(
    name: str, value: float | None, half: float, flagged: bool = False, prompts: int = 100, degree: float = 0.1
) -> ModelMismatch:
    return ModelMismatch(
        policy_model=name,
        rating=1000.0,
        rating_standard_error=3.0,
        reward_model_rating=None if value is None else 1000.0 + value,
        overvaluation=Estimate(value=None, low=300.0)
        if value is None
        else Estimate(value=value, low=value - half, high=value + half),
        mismatch_degree=Estimate(value=degree),
        mean_score=None,
        p_value=0.001 if flagged else 0.5,
        p_value_holm=0.004 if flagged else 1.0,
        flagged=flagged,
        prompts=prompts,
        note="no finite Elo" if value is None else "",
    )


def _report(*models: ModelMismatch) -> MismatchReport:
    nothing = Estimate(value=0.0)
    return MismatchReport(
        models=models,
        pairs=(),
        mean_absolute_mismatch=nothing,
        overvaluation_rmse=nothing,
        tie_rate=0.0,
        smallest_score_gap=None,
        prompts=100,
        config=MismatchConfig(),
    )


REPORT = _report(
    _model("high", 80.0, 10.0, flagged=True),
    _model("higher", 120.0, 10.0, flagged=True),
    _model("low", -90.0, 10.0, flagged=True),
    _model("neutral", 4.0, 12.0),
    _model("unsure", 0.5, 70.0),
)


def test_the_significantly_overvalued_are_chosen_largest_first_with_reasons() -> None:
    selection = select_models(REPORT)
    assert selection.overvalued_models == ("higher", "high")
    assert "significantly overvalued: +120 Elo points [+110, +130] on 100 prompts" in selection.overvalued[0].reason
    assert "p = 0.004" in selection.overvalued[0].reason
    assert selection.note == ""


def test_the_reference_is_surely_near_zero_not_merely_unknown() -> None:
    selection = select_models(REPORT)
    assert selection.reference_models == ("neutral",)
    assert "of the 2 models without significant mismatch" in selection.references[0].reason


def test_more_prompts_decide_between_equals() -> None:
    report = _report(_model("a", 1.0, 5.0, prompts=50), _model("b", 1.0, 5.0, prompts=200))
    assert select_models(report).reference_models == ("b",)


def test_the_number_of_overvalued_models_can_be_limited() -> None:
    assert select_models(REPORT, SelectionConfig(max_overvalued=1)).overvalued_models == ("higher",)


def test_a_model_that_wins_everything_comes_first() -> None:
    report = _report(
        _model("high", 80.0, 10.0, flagged=True), _model("all", None, 0.0, flagged=True), _model("n", 0.0, 5.0)
    )
    selection = select_models(report)
    assert selection.overvalued_models == ("all", "high")
    assert "no finite Elo (100 prompts)" in selection.overvalued[0].reason


def test_nothing_overvalued_is_said() -> None:
    selection = select_models(_report(_model("a", 3.0, 5.0), _model("b", -3.0, 5.0)))
    assert selection.overvalued == ()
    assert "nothing to correct" in selection.note


def test_without_a_neutral_model_the_smallest_mismatch_is_the_reference() -> None:
    report = _report(
        _model("a", 50.0, 5.0, flagged=True),
        _model("b", -20.0, 5.0, flagged=True),
        _model("c", -30.0, 5.0, flagged=True),
    )
    (choice,) = select_models(report).references
    assert choice.policy_model == "b"
    assert "every other model has a significant mismatch too" in choice.reason


def test_explicit_names_are_kept_and_explained() -> None:
    selection = select_models(REPORT, SelectionConfig(overvalued=("unsure",), references=("low", "neutral")))
    assert selection.overvalued_models == ("unsure",)
    assert selection.reference_models == ("low", "neutral")
    assert selection.overvalued[0].reason == "named in the configuration; +0 Elo points [-70, +70] on 100 prompts"


def test_a_named_reference_is_never_chosen_as_overvalued() -> None:
    selection = select_models(REPORT, SelectionConfig(references=("higher",)))
    assert selection.overvalued_models == ("high",)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SelectionConfig(overvalued=("nobody",)), r"overvalued models \[nobody\] have no scores; choose from \[high,"),
        (SelectionConfig(references=()), "list of reference models is empty"),
        (SelectionConfig(overvalued=("high",), references=("high",)), r"\[high\] cannot be both"),
        (SelectionConfig(overvalued=("high", "higher", "low", "neutral", "unsure")), "none is left as a reference"),
    ],
)
def test_contradictions_are_errors(config: SelectionConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_models(REPORT, config)


def test_auto_from_a_command_line_is_the_word_and_not_a_model() -> None:
    assert SelectionConfig.model_validate({"overvalued": ["auto"], "references": ("auto",)}) == SelectionConfig()
    assert SelectionConfig.model_validate({"overvalued": ["a", "auto"]}).overvalued == ("a", "auto")


def test_more_than_one_reference_can_be_asked_for() -> None:
    selection = select_models(REPORT, SelectionConfig(auto_references=2))
    assert selection.reference_models == ("neutral", "unsure")
    assert all(
        "of the 2 models without significant mismatch, one of the 2 surest" in r.reason for r in selection.references
    )
    assert select_models(REPORT, SelectionConfig(auto_references=9)).reference_models == ("neutral", "unsure")


def test_without_a_neutral_model_one_reference_is_enough() -> None:
    flagged = _report(
        *(_model(name, value, 5.0, flagged=True) for name, value in (("a", 90.0), ("b", -80.0), ("c", -60.0)))
    )
    selection = select_models(flagged, SelectionConfig(auto_references=2))
    assert selection.reference_models == ("c",)
    assert "every other model has a significant mismatch too" in selection.references[0].reason
