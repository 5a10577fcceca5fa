"""Style-controlled Bradley-Terry: held against another implementation, and against planted truth."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from sklearn.linear_model import LogisticRegression

from charm_core.bradley_terry import ratings_from_battles
from charm_core.elo import ELO_POINTS_PER_LOGIT
from charm_core.errors import GraphError, TableError
from charm_core.raw_battles import BattleTable, read_battles, style_covariates
from charm_core.style_control import fit_style_control, looks_encoded, normalised_differences, style_counts

Covariates = dict[str, tuple[np.ndarray, np.ndarray]]


def drawn(
    strengths: np.ndarray, coefficients: dict[str, float], number: int, seed: int, *, ties: float = 0.0
) -> tuple[pl.DataFrame, Covariates]:
    """Votes by the model itself: who wins depends on strength and on the normalised difference in style."""
    rng = np.random.default_rng(seed)
    models = strengths.size
    first = rng.integers(models, size=number)
    second = (first + rng.integers(1, models, size=number)) % models
    # models have styles of their own, or nothing would be confounded
    habit = np.linspace(1.0, 4.0, models)
    covariates = {
        name: (rng.poisson(8 * habit[first]).astype(float), rng.poisson(8 * habit[second]).astype(float))
        for name in coefficients
    }
    units = {name: np.sqrt(np.mean(normalised_differences(*sides) ** 2)) for name, sides in covariates.items()}
    logits = strengths[first] - strengths[second]
    for name, coefficient in coefficients.items():
        logits = logits + coefficient * normalised_differences(*covariates[name]) / units[name]
    won = np.where(rng.random(number) < expit(logits), "model_a", "model_b")
    names = np.array([f"m{index}" for index in range(models)])
    battles = pl.DataFrame(
        {
            "battle_id": np.arange(number),
            "model_a": names[first],
            "model_b": names[second],
            "winner": np.where(rng.random(number) < ties, "tie", won),
        }
    )
    return battles, covariates


def by_scipy(battles: pl.DataFrame, covariates: Covariates) -> tuple[dict[str, float], list[float], float]:
    """The same likelihood, written down again and minimised by a general method."""
    names = sorted({*battles["model_a"], *battles["model_b"]})
    first = np.array([names.index(name) for name in battles["model_a"]])
    second = np.array([names.index(name) for name in battles["model_b"]])
    outcome = battles["winner"].replace_strict({"model_a": 1.0, "model_b": 0.0, "tie": 0.5}).to_numpy()
    columns = []
    for a, b in covariates.values():
        difference = np.divide(a - b, a + b, out=np.zeros_like(a), where=a + b > 0)
        columns.append(difference / np.sqrt(np.mean(difference**2)))
    features = np.array(columns).T if columns else np.zeros((len(outcome), 0))

    def loss(parameters: np.ndarray) -> float:
        strengths = np.concatenate([[0.0], parameters[: len(names) - 1]])
        logits = strengths[first] - strengths[second] + features @ parameters[len(names) - 1 :]
        return -float((outcome * log_expit(logits) + (1 - outcome) * log_expit(-logits)).sum())

    found = minimize(loss, np.zeros(len(names) - 1 + len(columns)), method="BFGS", options={"gtol": 1e-6})
    strengths = np.concatenate([[0.0], found.x[: len(names) - 1]])
    elo = 1000 + ELO_POINTS_PER_LOGIT * (strengths - strengths.mean())
    return dict(zip(names, elo, strict=True)), found.x[len(names) - 1 :].tolist(), -found.fun


def test_without_covariates_it_is_the_ordinary_fit() -> None:
    battles, _ = drawn(np.array([0.0, 0.5, -0.7, 1.1]), {}, 900, seed=0, ties=0.2)
    styled, plain = fit_style_control(battles, {}).frame(), ratings_from_battles(battles)
    assert styled["policy_model"].to_list() == plain["policy_model"].to_list()
    for column in ("rating", "rating_low", "rating_high", "votes"):
        np.testing.assert_allclose(styled[column], plain[column], atol=1e-6)


@pytest.mark.parametrize("ties", [0.0, 0.25])
def test_another_implementation_finds_the_same(ties: float) -> None:
    battles, covariates = drawn(np.array([0.0, 0.6, -0.4, 0.2]), {"length": 0.5, "lists": -0.3}, 600, 1, ties=ties)
    fit = fit_style_control(battles, covariates)
    ratings, coefficients, likelihood = by_scipy(battles, covariates)
    np.testing.assert_allclose(fit.ratings, list(ratings.values()), atol=0.01)
    np.testing.assert_allclose([one.coefficient for one in fit.coefficients], coefficients, atol=1e-4)
    assert fit.log_likelihood == pytest.approx(likelihood, abs=1e-6)


def test_logistic_regression_finds_the_same() -> None:
    battles, covariates = drawn(np.array([0.0, 0.6, -0.4]), {"length": 0.8}, 1500, seed=2)
    fit = fit_style_control(battles, covariates)
    names = fit.policy_models
    design = np.zeros((battles.height, len(names)))
    for column, name in enumerate(names[1:]):
        design[:, column] = (battles["model_a"] == name).cast(pl.Int8) - (battles["model_b"] == name).cast(pl.Int8)
    difference = normalised_differences(*covariates["length"])
    design[:, -1] = difference / np.sqrt(np.mean(difference**2))
    model = LogisticRegression(C=1e9, fit_intercept=False, tol=1e-10, max_iter=10_000)
    model.fit(design, (battles["winner"] == "model_a").to_numpy())
    strengths = np.concatenate([[0.0], model.coef_[0, :-1]])
    expected = 1000 + ELO_POINTS_PER_LOGIT * (strengths - strengths.mean())
    np.testing.assert_allclose(fit.ratings, expected, atol=0.05)
    assert fit.coefficients[0].coefficient == pytest.approx(model.coef_[0, -1], abs=1e-3)


def test_planted_coefficients_and_ratings_come_back() -> None:
    strengths = np.array([0.0, 0.3, -0.2, 0.5, -0.6, 0.1])
    planted = {"length": 0.6, "headers": 0.0, "lists": -0.25}
    battles, covariates = drawn(strengths, planted, 60_000, seed=3)
    fit = fit_style_control(battles, covariates)
    for one in fit.coefficients:
        assert abs(one.coefficient - planted[one.name]) < 4 * one.standard_error
    truth = 1000 + ELO_POINTS_PER_LOGIT * (strengths - strengths.mean())
    assert (np.abs(np.array(fit.ratings) - truth) < 4 * np.array(fit.standard_errors)).all()
    # models with long answers look better than they are when style is ignored
    plain = ratings_from_battles(battles)["rating"].to_numpy()
    assert np.abs(plain - truth).max() > 5 * np.abs(np.array(fit.ratings) - truth).max()


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    strengths = np.array([0.0, 0.4, -0.3, 0.2])
    truth = ELO_POINTS_PER_LOGIT * (strengths - strengths.mean())
    inside = []
    for seed in range(120):
        fit = fit_style_control(*drawn(strengths, {"length": 0.5}, 800, seed=100 + seed))
        z = (np.array(fit.ratings) - 1000 - truth) / np.array(fit.standard_errors)
        coefficient = fit.coefficients[0]
        inside += [*(np.abs(z) < 1.96), abs(coefficient.coefficient - 0.5) < 1.96 * coefficient.standard_error]
    # 600 intervals, four of five correlated within a draw: about ± 2.5 points
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)


def test_which_side_is_called_a_changes_nothing() -> None:
    battles, covariates = drawn(np.array([0.0, 0.6, -0.4]), {"length": 0.5}, 500, seed=4, ties=0.1)
    rng = np.random.default_rng(5)
    swapped = rng.random(battles.height) < 0.5
    turned = {"model_a": "model_b", "model_b": "model_a", "tie": "tie"}
    other = battles.with_columns(
        model_a=pl.when(pl.Series(swapped)).then("model_b").otherwise("model_a"),
        model_b=pl.when(pl.Series(swapped)).then("model_a").otherwise("model_b"),
        winner=pl.when(pl.Series(swapped)).then(pl.col("winner").replace_strict(turned)).otherwise("winner"),
    )
    a, b = covariates["length"]
    flipped = {"length": (np.where(swapped, b, a), np.where(swapped, a, b))}
    np.testing.assert_allclose(
        fit_style_control(other, flipped).ratings, fit_style_control(battles, covariates).ratings, atol=1e-7
    )


def test_the_order_of_the_votes_changes_nothing() -> None:
    battles, covariates = drawn(np.array([0.0, 0.6, -0.4]), {"length": 0.5}, 300, seed=6)
    order = np.random.default_rng(7).permutation(300)
    shuffled = {name: (a[order], b[order]) for name, (a, b) in covariates.items()}
    first, second = fit_style_control(battles, covariates), fit_style_control(battles[order], shuffled)
    np.testing.assert_allclose(first.ratings, second.ratings, atol=1e-8)


def test_a_covariate_that_never_differs_is_named_and_left_out() -> None:
    battles, covariates = drawn(np.array([0.0, 0.5]), {"length": 0.5}, 200, seed=8)
    same = np.full(200, 3.0)
    fit = fit_style_control(battles, covariates | {"bold": (same, same)})
    assert fit.constant == ("bold",)
    assert [one.name for one in fit.coefficients] == ["length"]


def test_covariates_that_say_the_same_are_named() -> None:
    battles, covariates = drawn(np.array([0.0, 0.5, 1.0]), {"length": 0.5, "bold": 0.1}, 200, seed=9)
    a, b = covariates["length"]
    with pytest.raises(GraphError, match=r"\['length', 'words'\] cannot be told apart"):
        fit_style_control(battles, covariates | {"words": (2 * a, 2 * b)})


def test_a_covariate_that_is_who_wrote_it_is_named() -> None:
    battles, _ = drawn(np.array([0.0, 0.5]), {}, 200, seed=10)
    mine = (battles["model_a"] == "m0").to_numpy().astype(float)
    with pytest.raises(GraphError, match=r"\['signature'\] cannot be told apart from each other or from who"):
        fit_style_control(battles, {"signature": (mine, 1 - mine)})


def test_a_covariate_that_decides_every_vote_has_no_finite_coefficient() -> None:
    battles, covariates = drawn(np.array([0.0, 0.1, 0.2]), {"length": 0.5}, 300, seed=11)
    won = (battles["winner"] == "model_a").to_numpy().astype(float)
    with pytest.raises(GraphError, match=r"no finite fit.*'decisive'"):
        fit_style_control(battles, covariates | {"decisive": (2 + won, 3 - won)})


def test_a_model_that_never_won_is_named() -> None:
    battles, covariates = drawn(np.array([0.0, 0.1]), {"length": 0.5}, 100, seed=12)
    winner = pl.when(pl.col("model_a") == "m0").then(pl.lit("model_a")).otherwise(pl.lit("model_b"))
    unbeaten = battles.with_columns(winner=winner)
    with pytest.raises(GraphError, match=r"m1\] never beat"):
        fit_style_control(unbeaten, covariates)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((np.ones(3), np.ones(3)), r"one value per battle and side \(100\)"),
        ((-np.ones(100), np.ones(100)), r"finite and not negative"),
        ((np.full(100, np.nan), np.ones(100)), r"finite and not negative"),
    ],
)
def test_impossible_covariates_are_refused(sides: tuple[np.ndarray, np.ndarray], message: str) -> None:
    battles, _ = drawn(np.array([0.0, 0.1]), {}, 100, seed=13)
    with pytest.raises(TableError, match=message):
        fit_style_control(battles, {"length": sides})


def test_normalised_differences() -> None:
    np.testing.assert_allclose(
        normalised_differences(np.array([3.0, 0.0, 0.0]), np.array([1.0, 0.0, 5.0])), [0.5, 0.0, -1.0]
    )


def test_style_is_counted_outside_of_code() -> None:
    text = "# Title\n\nSome **bold** and __more__.\n\n- one\n * two\n1. three\n\n```\n# not a header\n- not a list\n```\n## End"
    counts = style_counts(pl.Series([text, "", "#no header\n-no list **\nbroken**"]))
    assert counts.rows() == [(float(len(text)), 2.0, 2.0, 3.0), (0.0, 0.0, 0.0, 0.0), (31.0, 0.0, 0.0, 0.0)]


def test_lists_in_the_form_of_text_are_recognised() -> None:
    assert looks_encoded(pl.Series(['["Hello", null]', '["a\\nb"]']))
    assert not looks_encoded(pl.Series(["Hello", "[1] is a footnote"]))
    assert not looks_encoded(pl.Series([None], dtype=pl.String))


@pytest.mark.real
def test_real_votes_with_the_style_of_the_real_responses(shared_data: Path) -> None:
    table = BattleTable(
        model_a="left", model_b="right", outcomes={"left": "model_a", "right": "model_b"}, where={"judge": "crowd"},
        responses_prompt_id="prompt", responses_policy_model="name", responses_text="result",
    )  # fmt: skip
    votes = read_battles(pl.read_parquet(shared_data / "llmfao_battles.parquet"), table)
    covariates = style_covariates(votes, table, pl.read_parquet(shared_data / "llmfao_responses.parquet"))
    fit = fit_style_control(votes.battles, covariates)
    assert (fit.battles, len(fit.policy_models)) == (8931, 59)
    assert [one.name for one in fit.coefficients] == ["length", "headers", "bold", "lists"]
    # people liked longer answers, and in this collection headers come with answers that are worse
    elo = {one.name: one.elo for one in fit.coefficients}
    assert elo["length"] > 10
    assert elo["headers"] < -20
    plain = ratings_from_battles(votes.battles).sort("policy_model")["rating"].to_numpy()
    shift = np.array(fit.ratings) - plain
    assert 5 < np.abs(shift).max() < 150
    assert np.corrcoef(plain, fit.ratings)[0, 1] > 0.95
