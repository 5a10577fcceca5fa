import pytest
from pydantic import ValidationError

from charm_core.records import Estimate


def test_an_estimate_survives_json() -> None:
    estimate = Estimate(value=0.25, low=-0.5)
    assert Estimate.model_validate_json(estimate.model_dump_json()) == estimate
    assert estimate.high is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Estimate(value=value)


def test_an_estimate_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Estimate(value=1.0).value = 2.0  # type: ignore[misc]
