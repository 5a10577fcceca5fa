import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from charm_core.reward_model.losses import (
    PairTargets,
    anchor,
    bradley_terry,
    centering,
    margin_regression,
    pair_losses,
    root_mean_square,
)
from charm_core.reward_model.spec import TrainingConfig

scores = st.floats(-20, 20)


def one(value):
    return torch.tensor([value], dtype=torch.float64)


def test_equal_scores_lose_ln_2():
    assert bradley_terry(one(3.0), one(3.0)).item() == pytest.approx(math.log(2))


def test_worked_values():
    assert bradley_terry(one(2.0), one(1.0)).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert bradley_terry(one(2.0), one(1.0), margin=one(1.0)).item() == pytest.approx(math.log(2))
    smooth = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1))
    assert bradley_terry(one(2.0), one(1.0), label_smoothing=0.1).item() == pytest.approx(smooth)
    assert margin_regression(one(2.0), one(-1.0), margin=one(1.0), scale=2.0).item() == pytest.approx(1.0)
    assert centering(one(2.0), one(-0.5)).item() == pytest.approx(2.25)
    assert anchor(one(2.0), one(0.0), level=one(3.0), scale=2.0).item() == pytest.approx(1.0)


@given(scores, scores, st.floats(0, 0.49), st.floats(-3, 3))
def test_bradley_terry_is_the_smoothed_cross_entropy(chosen, rejected, smoothing, margin):
    p = 1 / (1 + math.exp(-(chosen - rejected - margin)))
    if 1e-12 < p < 1 - 1e-12:
        expected = -(1 - smoothing) * math.log(p) - smoothing * math.log1p(-p)
        found = bradley_terry(one(chosen), one(rejected), margin=one(margin), label_smoothing=smoothing)
        assert found.item() == pytest.approx(expected, rel=1e-6)


@given(scores, scores, scores, scores, st.floats(0.01, 100))
def test_the_unit_of_scores_does_not_matter_to_margin_regression(a, b, c, d, unit):
    margins = torch.tensor([c - d, 1.0], dtype=torch.float64)
    there = margin_regression(one(a), one(b), margin=one(c - d), scale=root_mean_square(margins))
    here = margin_regression(
        one(a * unit), one(b * unit), margin=one((c - d) * unit), scale=root_mean_square(margins * unit)
    )
    assert here.item() == pytest.approx(there.item(), rel=1e-9, abs=1e-12)


def test_a_constant_model_has_a_mean_margin_regression_loss_of_1():
    margins = torch.tensor([0.3, 1.2, 2.0, 0.01], dtype=torch.float64)
    same = torch.zeros(4, dtype=torch.float64)
    assert margin_regression(
        same, same, margin=margins, scale=root_mean_square(margins)
    ).mean().item() == pytest.approx(1)


def test_the_configuration_decides_what_is_added():
    targets = PairTargets(margin=one(1.0), level=one(0.5))
    plain = pair_losses(one(2.0), one(1.0), targets, TrainingConfig(), 2.0)
    assert plain.item() == pytest.approx(bradley_terry(one(2.0), one(1.0)).item())
    every = TrainingConfig(use_margin=True, label_smoothing=0.1, centering=0.01, anchor=0.5)
    expected = (
        bradley_terry(one(2.0), one(1.0), margin=one(1.0), label_smoothing=0.1)
        + 0.01 * centering(one(2.0), one(1.0))
        + 0.5 * anchor(one(2.0), one(1.0), level=one(0.5), scale=2.0)
    )
    assert pair_losses(one(2.0), one(1.0), targets, every, 2.0).item() == pytest.approx(expected.item())


def test_margin_regression_with_anchor_is_least_at_the_calibrated_scores():
    calibrated = torch.tensor([1.7, -0.4], dtype=torch.float64, requires_grad=True)
    targets = PairTargets(margin=one(2.1), level=one(0.65))
    config = TrainingConfig(objective="margin_regression", anchor=1.0)
    pair_losses(calibrated[:1], calibrated[1:], targets, config, 1.0).sum().backward()
    torch.testing.assert_close(calibrated.grad, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "margin_regression", "label_smoothing": 0.1},
        {"objective": "margin_regression", "use_margin": True},
        {"zero_stage": None, "ranks": 2},
        {"ranks": 0},
        {"unknown": 1},
    ],
)
def test_contradicting_settings_are_errors(settings):
    with pytest.raises(ValidationError):
        TrainingConfig(**settings)
