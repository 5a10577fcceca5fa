"""How far sampling is: a bar per policy model where somebody looks at a terminal, a progress artifact in Prefect."""

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from tasks.answering.asking import Asking
from tasks.policy_models import OpenAIBackend
from tasks.publishing import report_progress

_REPORT_SECONDS = 10.0


class SamplingProgress:
    """Shows the answers of some policy models as they come, while a ``with`` block lasts."""

    def __init__(self, askings: Iterable[Asking]) -> None:
        self._askings = [asking for asking in askings if asking.missing]
        self._stack = ExitStack()
        self._shown: dict[Asking, tuple[Any, Callable[[int, int], None]]] = {}
        self._reported: dict[Asking, float] = {}

    def __enter__(self) -> Self:
        """Open the bars and the artifacts."""
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        for position, asking in enumerate(self._askings):
            bar = tqdm(
                total=asking.missing,
                desc=asking.model.name,
                unit=" answers",
                position=position,
                file=sys.stderr,
                disable=None,  # where nobody looks
                mininterval=0.5,
                dynamic_ncols=True,
            )
            report = self._stack.enter_context(report_progress(f"sampling {asking.model.name}"))
            self._shown[asking] = (self._stack.enter_context(bar), report)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close them."""
        self._stack.__exit__(kind, error, traceback)

    def update(self, asking: Asking) -> None:
        """One more answer has come."""
        bar, report = self._shown[asking]
        bar.set_postfix_str(rates(asking), refresh=False)
        bar.update()
        now = time.monotonic()
        if now - self._reported.get(asking, -_REPORT_SECONDS) >= _REPORT_SECONDS:
            self._reported[asking] = now
            report(asking.asked, asking.missing)


def rates(asking: Asking) -> str:
    """Tokens a second, what it has cost so far, and how many requests failed, as far as that is known."""
    backend = asking.model.backend
    speed = asking.tokens_per_second
    cost = backend.cost(asking.prompt_tokens, asking.response_tokens) if isinstance(backend, OpenAIBackend) else None
    parts = [
        f"{speed:,.0f} tokens/s" if speed else "",
        f"cost {cost:.2f}" if cost is not None else "",
        f"{asking.failed} failed" if asking.failed else "",
    ]
    return ", ".join(filter(None, parts))
