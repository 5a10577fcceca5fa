"""The prompts that are still to be answered, asked of all policy models at once: endpoints side by side, local models in turn.

Each endpoint has a thread; all models that run on this machine share one, for they would share its memory. A thread writes
every answer to its shard's journal before anybody hears of it. The caller's thread is told as answers come, and can do
what only it can do: tell Prefect, and store the shards that are complete.
"""

import contextvars
import queue
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import polars as pl

from charm_core.errors import SamplingError
from charm_core.sampling import Answer, Decoding
from charm_core.tables import PROMPTS
from tasks.answering.back_end import Prompt
from tasks.answering.journal import Journal
from tasks.answering.policy_model_refs import PolicyModelRef
from tasks.secrets import secret
from tasks.store import ArtifactRef, ArtifactStore

REASONS_SHOWN = 3


@dataclass(kw_only=True, eq=False)
class Shard:
    """Some of the prompts, and what one policy model has answered so far."""

    prompts: ArtifactRef
    key: str
    journal: Journal
    missing: set[str] = field(default_factory=set)
    """Prompts without an answer, not counting those that failed in this run."""
    failed: int = 0
    """Prompts that failed in this run."""


@dataclass(kw_only=True, eq=False)
class Asking:
    """What is to be asked of one policy model, and what came of it in this run."""

    model: PolicyModelRef
    decoding: Decoding
    shards: list[Shard]
    allowed_failures: int
    answered_before: bool
    """Whether it has answered anything in an earlier run."""
    asked: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why requests failed."""

    def __post_init__(self) -> None:
        self.missing = sum(len(shard.missing) for shard in self.shards)
        self._shard_of = {prompt_id: shard for shard in self.shards for prompt_id in shard.missing}
        self._started = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Response tokens a second, where the back end counts them."""
        return self.response_tokens / self.seconds if self.response_tokens and self.seconds else None

    @property
    def failed(self) -> int:
        """Requests that failed."""
        return sum(shard.failed for shard in self.shards)

    def check_secret(self) -> None:
        """Find out that the key is missing before anybody is asked.

        Raises:
            ConfigError: There is something to ask, and no key.
        """
        name = self.model.backend.secret_name()
        if self.missing and name:
            secret(name)

    def prompts(self, store: ArtifactStore) -> Iterator[Prompt]:
        """The missing prompts, shard by shard, read when they are needed."""
        self._started = time.monotonic()
        for shard in self.shards:
            missing = frozenset(shard.missing)
            if missing:
                table = store.read_table(shard.prompts, PROMPTS).filter(pl.col("prompt_id").is_in(missing))
                for prompt_id, messages in table.select("prompt_id", "messages").iter_rows():
                    yield Prompt(prompt_id=prompt_id, messages=messages)

    def note(self, answer: Answer) -> Shard:
        """Write an answer down, and return the shard that it belongs to.

        Raises:
            ArtifactError: It cannot be written.
            SamplingError: Too many requests failed.
        """
        shard = self._shard_of.pop(answer.prompt_id)
        shard.journal.append(answer)
        shard.missing.discard(answer.prompt_id)
        self.asked += 1
        self.prompt_tokens += answer.prompt_tokens or 0
        self.response_tokens += answer.response_tokens or 0
        self.seconds = time.monotonic() - self._started
        if not shard.missing:
            shard.journal.close()
        if answer.status == "failed":
            shard.failed += 1
            self.reasons[answer.reason or "no reason given"] += 1
            self._check_failures()
        return shard

    def _check_failures(self) -> None:
        if self.failed > self.allowed_failures:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in self.reasons.most_common(REASONS_SHOWN))
            raise SamplingError(
                f"{self.failed} of {self.asked} requests to {self.model.name!r} failed for good, and max_failed_share allows "
                f"{self.allowed_failures}: {reasons}. What was answered is kept; mend the reason and run again, or raise "
                f"max_failed_share"
            )


@dataclass(frozen=True, kw_only=True)
class Told:
    """One answer has come."""

    asking: Asking
    finished: Shard | None
    """The shard, if this was the last of its missing prompts."""


def ask_all(store: ArtifactStore, askings: Iterable[Asking]) -> Generator[Told, None, None]:
    """Ask for everything that is missing; close the iterator to stop asking.

    Raises:
        ConfigError, ServiceError, SamplingError, ModelError, ...: The first thing that went wrong with any of them. The
            others are stopped too; what was answered is in the journals.
    """
    events: queue.Queue[Told | BaseException | None] = queue.Queue()
    stop = threading.Event()
    lanes = [_Lane(store=store, askings=lane, events=events, stop=stop).thread() for lane in _lanes(askings)]
    try:
        for lane in lanes:
            lane.start()
        running = len(lanes)
        while running:
            event = events.get()
            if event is None:
                running -= 1
            elif isinstance(event, Told):
                yield event
            else:
                raise event
    finally:
        stop.set()
        for lane in lanes:
            if lane.ident is not None:  # started
                lane.join()


def _lanes(askings: Iterable[Asking]) -> list[list[Asking]]:
    """What runs side by side, each a list of what runs one after the other."""
    busy = [asking for asking in askings if asking.missing]
    alone = [[asking] for asking in busy if asking.model.backend.side_by_side]
    in_turn = [asking for asking in busy if not asking.model.backend.side_by_side]
    return [*alone, in_turn] if in_turn else alone


@dataclass(frozen=True, kw_only=True)
class _Lane:
    """Asks some policy models, one after the other."""

    store: ArtifactStore
    askings: Sequence[Asking]
    events: "queue.Queue[Told | BaseException | None]"
    stop: threading.Event

    def thread(self) -> threading.Thread:
        """A thread that asks until all is answered, something goes wrong, or there is no more need."""
        context = contextvars.copy_context()  # secrets
        return threading.Thread(target=context.run, args=(self._run,), name=f"sampling {self.askings[0].model.name}")

    def _run(self) -> None:
        try:
            for asking in self.askings:
                if not self.stop.is_set():
                    self._ask(asking)
        except BaseException as error:
            self.events.put(error)  # raised again by the caller's thread
        finally:
            self.events.put(None)

    def _ask(self, asking: Asking) -> None:
        def on_answer(answer: Answer) -> None:
            shard = asking.note(answer)
            self.events.put(Told(asking=asking, finished=None if shard.missing else shard))

        prompts, known = asking.prompts(self.store), asking.answered_before
        try:
            asking.model.backend.ask(asking.decoding, prompts, on_answer, self.stop, answered_before=known)
        finally:
            for shard in asking.shards:
                shard.journal.close()
