"""How far sampling is: a stage per policy model."""

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from tasks.answering.asking import Asking
from tasks.progress import Progress
from tasks.publishing import report_progress


class SamplingProgress:
    """Shows the answers of some policy models as they come, while a ``with`` block lasts."""

    def __init__(self, askings: Iterable[Asking]) -> None:
        self._askings = [asking for asking in askings if asking.missing]
        self._stack = ExitStack()
        self._shown: dict[Asking, Progress] = {}

    def __enter__(self) -> Self:
        """Open the stages."""
        for asking in self._askings:
            stage = report_progress(f"sampling {asking.model.name}", "answers")
            self._shown[asking] = self._stack.enter_context(stage)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close them."""
        self._stack.__exit__(kind, error, traceback)

    def update(self, asking: Asking) -> None:
        """One more answer has come."""
        self._shown[asking](asking.asked, asking.missing, rates(asking))


def rates(asking: Asking) -> str:
    """Tokens a second, what it has cost so far, and how many requests failed, as far as that is known."""
    speed = asking.tokens_per_second
    cost = asking.model.backend.cost(asking.prompt_tokens, asking.response_tokens)
    parts = [
        f"{speed:,.0f} tokens/s" if speed else "",
        f"cost {cost:.2f}" if cost is not None else "",
        f"{asking.failed} failed" if asking.failed else "",
    ]
    return ", ".join(filter(None, parts))
