"""From a judge's verdicts to preferences, and what the judge itself leans towards."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from charm_core.errors import TableError
from charm_core.judging import Verdict
from charm_core.records import Estimate, Record
from charm_core.resampling import bootstrap_weights, percentile_estimate
from charm_core.tables import PREFERENCES, validate

FloatArray = NDArray[np.float64]

_REPLICATES = 2000
_CONFIDENCE = 0.95
_FOR_FIRST = {"first": 1.0, "tie": 0.5, "second": 0.0}


class JudgeReport(Record):
    """What a judge decided, and how it leans. Intervals are bootstraps over prompts, 95 %."""

    prompts: int
    comparisons: int = Field(description="Pairs of responses to one prompt.")
    identical: int = Field(description="Of them, pairs of identical responses: ties that the judge is not shown.")
    failed: int = Field(description="Left out because a request failed.")
    unreadable: int = Field(description="Left out because an answer had no verdict, even when asked again.")
    judged: int = Field(description="With a verdict in both orders.")
    asked_again: int = Field(description="Requests whose first answer had no verdict.")
    consistent: int = Field(description="Judged comparisons with the same outcome in both orders.")
    reversed: int = Field(description="Judged comparisons where each response wins in one order.")
    tie_share: float = Field(description="Of all verdicts.")
    first_share: Estimate = Field(
        description="Share of the verdicts that are no tie for the response shown first; without a leaning 0.5."
    )
    first_of_reversed: Estimate = Field(
        description="Share of the reversed comparisons where it is the response shown first that wins."
    )
    longer_share: Estimate = Field(description="Share of the decided comparisons that the longer response wins.")
    own_share: Estimate | None = Field(
        default=None, description="Mean preference for the judge's own responses, where it is one of the policy models."
    )

    def sentences(self, judge: str) -> tuple[str, ...]:
        """What the reader of a report should know about the judge."""
        others = [
            f"{count:,} {what}"
            for count, what in (
                (self.identical, "are of identical responses and count as ties"),
                (self.failed, "are left out because a request failed"),
                (self.unreadable, "are left out because an answer had no verdict"),
            )
            if count
        ]
        first = self.first_share
        leans = first.low is not None and first.high is not None and not first.low <= 0.5 <= first.high
        return (
            f"{judge} judged {self.judged:,} of {self.comparisons:,} comparisons on {self.prompts:,} prompts, each in both orders"
            f"{'; ' + ', '.join(others) if others else ''}.",
            f"Of its verdicts for one side, {_shown(first)} are for the response shown first"
            f"{', so it leans towards a place, which the two orders cancel' if leans else ''}; "
            f"{self.reversed:,} comparisons turn with the order.",
            f"The longer response wins {_shown(self.longer_share)} of the decided comparisons.",
            *(
                (f"Where one of the responses is its own, it prefers that by {_shown(self.own_share)} on average.",)
                if self.own_share
                else ()
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """A judge's preferences, and its leanings."""

    preferences: pl.DataFrame
    """PREFERENCES: the mean of both orders; comparisons without two verdicts are left out."""
    report: JudgeReport


def weigh_verdicts(
    comparisons: pl.DataFrame,
    verdicts: Mapping[str, Verdict],
    *,
    failed: Collection[str] = (),
    asked_again: int = 0,
    own: str | None = None,
    seed: int = 0,
) -> Weighed:
    """Put the two verdicts on each comparison together.

    Args:
        comparisons: Of the ``JudgePlan``.
        verdicts: Request id to verdict; requests without one are missing.
        failed: Requests that were not answered.
        asked_again: Requests whose first answer had no verdict.
        own: The policy model that is the judge itself, if one is.
        seed: Of the bootstrap.

    Raises:
        TableError: No comparison has both verdicts.
    """
    read = pl.DataFrame(
        {"request": list(verdicts), "for_first": [_FOR_FIRST[verdict] for verdict in verdicts.values()]},
        schema={"request": pl.String, "for_first": pl.Float64},
    )
    both = (
        comparisons.join(read, left_on="a_first", right_on="request", how="left")
        .join(read, left_on="b_first", right_on="request", how="left", suffix="_of_b")
        .with_columns(
            identical=pl.col("a_first").is_null(),
            failed=pl.col("a_first").is_in(list(failed)) | pl.col("b_first").is_in(list(failed)),
            preference_a=(pl.col("for_first") + 1 - pl.col("for_first_of_b")) / 2,
        )
        .sort("prompt_id", "model_a", "model_b")
    )
    judged = both.filter(pl.col("preference_a").is_not_null())
    lost = both.filter(~pl.col("identical") & pl.col("preference_a").is_null())
    if judged.is_empty():
        raise TableError(
            f"the judge gave no verdict on any of {comparisons.height} comparisons ({lost.get_column('failed').sum()} requests "
            "failed, the others could not be read); look at its answers and at the template"
        )
    preferences = pl.concat([judged, both.filter("identical").with_columns(preference_a=pl.lit(0.5))])
    return Weighed(
        preferences=validate(preferences.select(list(PREFERENCES.columns)), PREFERENCES),
        report=JudgeReport(
            prompts=comparisons.get_column("prompt_id").n_unique(),
            comparisons=comparisons.height,
            identical=int(both.get_column("identical").sum()),
            failed=int(lost.get_column("failed").sum()),
            unreadable=lost.height - int(lost.get_column("failed").sum()),
            judged=judged.height,
            asked_again=asked_again,
            **_leanings(judged, own, np.random.default_rng(seed)),
        ),
    )


def _leanings(judged: pl.DataFrame, own: str | None, rng: np.random.Generator) -> dict[str, object]:
    shown_first = judged.select("for_first", "for_first_of_b").to_numpy()
    wins = (shown_first == 1.0).sum(axis=1)
    decided = (shown_first != 0.5).sum(axis=1)
    reverses = (decided == 2) & (wins != 1)
    preference = judged.get_column("preference_a").to_numpy()
    longer_is_a = (judged.get_column("longer") == judged.get_column("model_a")).fill_null(value=False).to_numpy()
    counts = (preference != 0.5) & judged.get_column("longer").is_not_null().to_numpy()
    own_is_a = (judged.get_column("model_a") == (own or "")).to_numpy()
    involved = own_is_a | (judged.get_column("model_b") == (own or "")).to_numpy()
    share = _Shares(judged.get_column("prompt_id"), rng)
    return {
        "consistent": int((shown_first.sum(axis=1) == 1.0).sum()),
        "reversed": int(reverses.sum()),
        "tie_share": float((shown_first == 0.5).mean()),
        "first_share": share.of(wins, decided),
        "first_of_reversed": share.of(reverses & (wins == 2), reverses),
        "longer_share": share.of(counts & (longer_is_a == (preference > 0.5)), counts),
        "own_share": share.of(np.where(own_is_a, preference, 1 - preference) * involved, involved)
        if involved.any()
        else None,
    }


class _Shares:
    """Ratios of sums over comparisons, with one bootstrap over prompts for all of them."""

    def __init__(self, prompt_ids: pl.Series, rng: np.random.Generator) -> None:
        self._prompt = prompt_ids.rank("dense").to_numpy().astype(np.int64) - 1
        self._prompts = int(self._prompt.max()) + 1
        self._weights = np.concatenate(list(bootstrap_weights(self._prompts, _REPLICATES, rng)))

    def of(self, parts: NDArray[np.generic], wholes: NDArray[np.generic]) -> Estimate:
        """Sum of the parts over sum of the wholes; no value where there is nothing to divide by."""
        part, whole = (
            np.bincount(self._prompt, weights=values.astype(np.float64), minlength=self._prompts)
            for values in (parts, wholes)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return percentile_estimate(
                float(np.divide(part.sum(), whole.sum())), (self._weights @ part) / (self._weights @ whole), _CONFIDENCE
            )


def _shown(share: Estimate) -> str:
    if share.value is None:
        return "an unknown share"
    interval = f" ({share.low:.1%} to {share.high:.1%})" if share.low is not None and share.high is not None else ""
    return f"{share.value:.1%}{interval}"
