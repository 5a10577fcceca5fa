from typing import Any

import pytest

from charm_core.benchmarks.judgebench import judgebench
from charm_core.errors import TableError
from tests.charm_core.benchmarks.made_up import result_as_written, values

GPT = "gpt-4o-2024-05-13"
CLAUDE = "claude-3-5-sonnet-20240620"
PAIRS = {"mmlu-pro-law": 154, "livebench-reasoning": 98, "livebench-math": 56, "livecodebench": 42}

RIGHT = {
    "Skywork/Skywork-Reward-Gemma-2-27B": (92, 65, 47, 21),  # three ties among the wrong ones
    "internlm/internlm2-20b-reward": (96, 68, 37, 21),
}
"""Right pairs per source, of the scores in the authors' repository (ScalerLab/JudgeBench, outputs/)."""
PUBLISHED = {"Skywork/Skywork-Reward-Gemma-2-27B": 64.29, "internlm/internlm2-20b-reward": 63.43}
"""Overall, arXiv 2410.12784."""


def _row(number: int, source: str, a: str, b: str, label: str, model: str = GPT) -> dict[str, Any]:
    return {
        "pair_id": f"{model} {source} {number}",
        "original_id": None,
        "source": source,
        "question": f"question {source} {number}",
        "response_model": model,
        "response_A": a,
        "response_B": b,
        "label": label,
    }


@pytest.mark.parametrize("model", RIGHT)
def test_the_published_figure_follows_from_the_right_pairs(model: str) -> None:
    rows = [
        _row(n, source, *(("1", "0") if n < right else ("0", "1")), "A>B")
        for (source, pairs), right in zip(PAIRS.items(), RIGHT[model], strict=True)
        for n in range(pairs)
    ]
    result = result_as_written(judgebench(rows))
    assert result.figure("overall").value.value == pytest.approx(PUBLISHED[model] / 100, abs=5e-5)
    assert {figure.note for figure in result.figures} == {""}
    # the mean of the sources is something else, though some have published it as JudgeBench
    by_source = [figure.value.value or 0.0 for figure in result.figures if figure.subset != "overall"]
    assert len(by_source) == 4
    assert abs(sum(by_source) / 4 - PUBLISHED[model] / 100) > 0.005


def test_the_label_says_which_response_is_right() -> None:
    rows = [
        _row(1, "livecodebench", "1", "0", "A>B"),  # right
        _row(2, "livecodebench", "1", "0", "B>A"),  # wrong
        _row(3, "livecodebench", "0", "1", "B>A"),  # right
    ]
    assert values(result_as_written(judgebench(rows)))["coding", "accuracy"] == pytest.approx(2 / 3)


def test_a_tie_is_wrong_whichever_response_is_right() -> None:
    rows = [_row(1, "livecodebench", "1", "1", "A>B"), _row(2, "livecodebench", "1", "1", "B>A")]
    figure = result_as_written(judgebench(rows)).figure("overall")
    assert (figure.value.value, figure.tie_rate) == (0.0, 1.0)


def test_overall_is_over_pairs_not_over_sources() -> None:
    rows = [_row(1, "livebench-math", "1", "0", "A>B")] + [_row(n, "mmlu-pro-law", "0", "1", "A>B") for n in range(3)]
    assert result_as_written(judgebench(rows)).figure("overall").value.value == 0.25


def test_two_response_models_have_figures_of_their_own() -> None:
    rows = [_row(1, "livebench-math", "1", "0", "A>B"), _row(1, "livebench-math", "0", "1", "A>B", CLAUDE)]
    result = result_as_written(judgebench(rows))
    assert values(result) == {
        ("overall", "accuracy"): 0.5,
        (f"overall ({GPT})", "accuracy"): 1.0,
        (f"overall ({CLAUDE})", "accuracy"): 0.0,
        (f"math ({GPT})", "accuracy"): 1.0,
        (f"math ({CLAUDE})", "accuracy"): 0.0,
    }
    assert result.note == "published figures are for one response model"
    assert result.figure(f"math ({CLAUDE})").note == "1 of 34 items: not comparable with published figures"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "A=B"}, r"the label 'A=B' is none of \['A>B', 'B>A'\]"),
        ({"source": "poetry"}, "the source 'poetry' begins with none of"),
    ],
)
def test_bad_rows(change: dict[str, str], message: str) -> None:
    with pytest.raises(TableError, match=message):
        judgebench([_row(1, "livecodebench", "1", "0", "A>B") | change])
