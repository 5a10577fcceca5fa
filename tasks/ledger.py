"""What a run did, step by step, and why: which steps were reused, which ran, and what had changed since the last run of its name.

A cache that is right but silent is not trusted. So every call of a step notes what its inputs were and what came out; the
next run of the same name is held against that.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ArtifactError
from tasks.store import ArtifactStore

_SHOWN = 60
_REASONS_SHOWN = 6


class StepCall(BaseModel):
    """One call of a step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    key: str
    reused: bool = Field(description="Whether its stored result was taken.")
    inputs: dict[str, Any] = Field(description="What its key is made of.")
    outputs: tuple[str, ...] = Field(description="Digests of the files that it returned.")


class Ledger(BaseModel):
    """The settings of one run and the calls of its steps, in order."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = Field(default={})
    calls: list[StepCall] = Field(default=[])


class Reuse(BaseModel):
    """What a run took from the cache, what it did, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reused: dict[str, int] = Field(description="Step to number of calls.")
    ran: dict[str, int]
    compared: bool = Field(description="Whether there was an earlier run of this name.")
    settings: tuple[str, ...] = Field(default=(), description="Settings that are not what they were then.")
    content: tuple[str, ...] = Field(
        default=(), description="Inputs of other content that no step made: files, models."
    )
    versions: tuple[str, ...] = Field(default=(), description="Steps that compute something else since.")
    lost: tuple[str, ...] = Field(default=(), description="Steps whose stored results were gone.")
    new: tuple[str, ...] = Field(default=(), description="Steps that ran and that the earlier run did not have.")


_ledger: ContextVar[Ledger] = ContextVar("charm_ledger")


@contextlib.contextmanager
def keep_ledger(store: ArtifactStore, name: str, settings: Mapping[str, Any]) -> Iterator[Ledger]:
    """Note the calls of a run, and keep the notes for the next one if it succeeds."""
    ledger = Ledger(settings=dict(settings))
    token = _ledger.set(ledger)
    try:
        yield ledger
    finally:
        _ledger.reset(token)
    store.write_note(_note(name), ledger.model_dump_json().encode())


def note_call(call: StepCall) -> None:
    """Add a call to the ledger of the current run, if it keeps one."""
    ledger = _ledger.get(None)
    if ledger is not None:
        ledger.calls.append(call)


def last_ledger(store: ArtifactStore, name: str) -> Ledger | None:
    """The notes of the last successful run of that name; None if there was none, or they cannot be read any more."""
    try:
        return Ledger.model_validate_json(store.read_note(_note(name)))
    except (ArtifactError, ValueError):
        return None


def explain(now: Ledger, before: Ledger | None) -> Reuse:
    """Say what was reused and what ran, and trace it to what no step made: settings, files, models, versions of steps."""
    counts = {
        reused: dict(Counter(call.step for call in now.calls if call.reused is reused)) for reused in (True, False)
    }
    if before is None:
        return Reuse(reused=counts[True], ran=counts[False], compared=False)
    made = {digest for call in now.calls for digest in call.outputs}
    content: dict[tuple[str, str], str] = {}
    versions: list[str] = []
    lost: list[str] = []
    new: list[str] = []
    for call in now.calls:
        like = _most_alike(call, before.calls)
        if like is None:
            new += [] if call.reused else [call.step]
        elif like.key == call.key:
            lost += [] if call.reused else [call.step]
        else:
            differences = _differences(like.inputs, call.inputs)
            versions += [] if differences else [call.step]
            for name, (old, value) in differences.items():
                if _is_digest(value) and value not in made:
                    content.setdefault((str(old), str(value)), f"{call.step}: {_sentence(name, old, value)}")
    return Reuse(
        reused=counts[True],
        ran=counts[False],
        compared=True,
        settings=tuple(_sentence(name, *pair) for name, pair in _differences(before.settings, now.settings).items()),
        content=tuple(content.values()),
        versions=tuple(dict.fromkeys(versions)),
        lost=tuple(dict.fromkeys(lost)),
        new=tuple(dict.fromkeys(new)),
    )


def reuse_lines(reuse: Reuse) -> list[str]:
    """The same in a few lines of text."""
    lines = [f"{sum(reuse.reused.values())} steps reused, {sum(reuse.ran.values())} ran"]
    if reuse.ran and reuse.reused:
        lines += [f"ran: {_listed(reuse.ran)}", f"reused: {_listed(reuse.reused)}"]
    if not reuse.compared:
        lines.append("no earlier run of this name to compare with")
    reasons = {
        "settings changed since the last run of this name": reuse.settings,
        "inputs have other content than then": reuse.content,
        "steps compute something else than then": reuse.versions,
        "stored results were missing or damaged": reuse.lost,
        "steps that the last run did not have": reuse.new,
    }
    for what, items in reasons.items():
        if items:
            more = f"; and {len(items) - _REASONS_SHOWN} more" if len(items) > _REASONS_SHOWN else ""
            lines.append(f"{what}: {'; '.join(items[:_REASONS_SHOWN])}{more}")
    return lines


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(step if count == 1 else f"{step} × {count}" for step, count in counts.items())


def _most_alike(call: StepCall, earlier: Sequence[StepCall]) -> StepCall | None:
    same = [other for other in earlier if other.step == call.step]
    exact = next((other for other in same if other.key == call.key), None)
    return exact or min(same, key=lambda other: len(_differences(other.inputs, call.inputs)), default=None)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted name to (old, new) of every leaf that differs."""
    old, new = _leaves(before), _leaves(now)
    names = [*new, *(name for name in old if name not in new)]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {name: value}
    return {
        leaf: found for key, item in items for leaf, found in _leaves(item, f"{name}.{key}" if name else key).items()
    }


def _sentence(name: str, old: Any, new: Any) -> str:
    return f"{name} {_shown(old)} → {_shown(new)}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if _is_digest(text):
        return text[:12]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,64}", value) is not None


def _note(name: str) -> str:
    return f"ledger-{name}"
