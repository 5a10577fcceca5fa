"""The win-rate objective: its two-pass gradient is exactly that of the loss it stands for."""

import polars as pl
import pytest
import torch

from charm_core.errors import RatingsError
from charm_core.reward_model.win_rates import WinRateTargets

RATINGS = pl.DataFrame(
    {
        "policy_model": ["a", "b", "c"],
        "rating": [1000.0, 1100.0, 1250.0],
        "rating_low": [None, None, None],
        "rating_high": [None, None, None],
        "votes": [None, None, None],
    }
)
# the same two models in both orders, as happens when the chosen one differs from prompt to prompt
PAIRS = pl.DataFrame({"chosen_model": ["a", "b", "a", "c", "b", "c"], "rejected_model": ["b", "a", "c", "a", "c", "b"]})
TEMPERATURE = 0.7


def direct_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """The definition, pair of policy models by pair."""
    elo = dict(zip(RATINGS["policy_model"], RATINGS["rating"], strict=True))
    cells = []
    for first, second in (("a", "b"), ("a", "c"), ("b", "c")):
        shares = []
        for row, (winner, loser) in enumerate(PAIRS.rows()):
            difference = (chosen[row] - rejected[row]) / TEMPERATURE
            if (winner, loser) == (first, second):
                shares.append(torch.sigmoid(difference))
            elif (loser, winner) == (first, second):
                shares.append(torch.sigmoid(-difference))
        probability = 1 / (1 + 10 ** ((elo[second] - elo[first]) / 400))
        cells.append(((torch.stack(shares).mean() - probability) / max(probability, 1 - probability)) ** 2)
    return torch.stack(cells).mean()


@pytest.mark.parametrize("cuts", [[6], [2, 4], [1, 1, 1, 3]])
def test_gradient_over_micro_batches_is_that_of_the_whole_loss(cuts: list[int]) -> None:
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = scores.clone().requires_grad_()
    loss = direct_loss(whole[0], whole[1])
    loss.backward()

    targets = WinRateTargets(PAIRS, RATINGS)
    parts = scores.clone().requires_grad_()
    rows = [list(part) for part in torch.arange(6).split(cuts)]

    def wins(batch: list[int]) -> torch.Tensor:
        return targets.smooth_wins(parts[0, batch], parts[1, batch], batch, TEMPERATURE)

    sums = torch.stack([targets.sums(wins(batch), batch) for batch in rows]).sum(dim=0)
    for batch in rows:
        targets.linear_losses(wins(batch), batch, targets.slopes(sums, targets.counts(range(6)))).sum().backward()

    assert targets.loss(sums) == pytest.approx(loss.item(), abs=1e-12)
    assert torch.allclose(parts.grad, whole.grad, atol=1e-12)
    assert whole.grad.abs().max() > 1e-3


def test_pairs_of_models_that_do_not_occur_in_a_step_count_for_nothing() -> None:
    targets = WinRateTargets(PAIRS, RATINGS)
    chosen, rejected = torch.tensor([0.3, -0.1]), torch.tensor([0.1, 0.4])
    sums = targets.sums(targets.smooth_wins(chosen, rejected, [0, 1], TEMPERATURE), [0, 1])
    expected = torch.sigmoid(torch.tensor([0.2, 0.5]) / TEMPERATURE).mean().item()
    probability = 1 / (1 + 10 ** (100 / 400))
    assert targets.loss(sums) == pytest.approx(((expected - probability) / (1 - probability)) ** 2, rel=1e-6)
    assert targets.slopes(sums, targets.counts([0, 1])).count_nonzero() == 1


def test_win_rates_that_match_have_no_loss_and_no_slope() -> None:
    targets = WinRateTargets(PAIRS, RATINGS)
    log_odds = {("a", "b"): -100, ("a", "c"): -250, ("b", "c"): -150}
    difference = [
        (log_odds[pair] if pair in log_odds else -log_odds[pair[::-1]]) / 400 * 2.302585092994046 * TEMPERATURE
        for pair in PAIRS.rows()
    ]
    chosen = torch.tensor(difference, dtype=torch.float64)
    sums = targets.sums(targets.smooth_wins(chosen, torch.zeros(6), list(range(6)), TEMPERATURE), list(range(6)))
    assert targets.loss(sums) == pytest.approx(0, abs=1e-20)
    assert targets.slopes(sums, targets.counts(range(6))).abs().max() < 1e-10


def test_a_policy_model_without_rating_is_named() -> None:
    with pytest.raises(RatingsError, match="'c'"):
        WinRateTargets(PAIRS, RATINGS.filter(pl.col("policy_model") != "c"))


def test_wins_are_hard_with_ties_half_and_smooth_ones_approach_them() -> None:
    targets = WinRateTargets(PAIRS, RATINGS)
    chosen, rejected = torch.tensor([1.0, 1.0, 0.0, 2.0, 5.0, 3.0]), torch.tensor([0.0, 0.0, 0.0, 3.0, 4.0, 3.0])
    rows = list(range(6))
    # rows 1 and 3 have the later name as chosen, so a win of chosen is a loss of the first name
    assert targets.wins(chosen, rejected, rows).tolist() == [1.0, 0.0, 0.5, 1.0, 1.0, 0.5]
    assert torch.allclose(targets.smooth_wins(chosen, rejected, rows, 1e-3), targets.wins(chosen, rejected, rows))
