"""Whom an evaluation is about: reward models on this machine or behind a server, scored alike."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from charm_core.reward_model.jobs import ScoringSummary
from charm_core.reward_model.spec import RewardModelSpec
from tasks.benchmark_sources import StoredBenchmark
from tasks.benchmarking import score_benchmarks
from tasks.prompts import ResponseSet
from tasks.remote_scoring import RemoteScorerConfig, RemoteScores, score_remotely
from tasks.scoring import RewardModelRef, identify_reward_model, score_responses
from tasks.store import ArtifactRef
from tasks.text_scores import ScoredTexts


@dataclass(frozen=True, kw_only=True)
class ScoredResponses:
    """Scores of the responses of rated policy models."""

    scores: ArtifactRef
    summary: ScoringSummary | None = None
    """None where a server scored."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A reward model to be evaluated."""

    label: str
    model: RewardModelRef | RemoteScorerConfig

    @property
    def path(self) -> str:
        """Where it is, for people."""
        if isinstance(self.model, RemoteScorerConfig):
            endpoint = self.model.endpoint
            return f"{endpoint.model} at {endpoint.deployment or urlsplit(endpoint.base_url).netloc}"
        spec = self.model.spec
        return spec.path if spec.revision is None else f"{spec.path}@{spec.revision}"

    @property
    def digest(self) -> str:
        """What identifies it."""
        if isinstance(self.model, RewardModelRef):
            return self.model.digest
        identity = {"endpoint": self.model.endpoint.identity(), "route": self.model.route}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def score_benchmarks(
        self, benchmarks: tuple[StoredBenchmark, ...]
    ) -> tuple[tuple[ScoredTexts, ...], tuple[str, ...]]:
        """Scores of every benchmark's texts, and warnings."""
        if isinstance(self.model, RewardModelRef):
            return (score_benchmarks(self.model, benchmarks) if benchmarks else ()), ()
        scored = [score_remotely(benchmark.texts, self.model) for benchmark in benchmarks]
        return tuple(_as_texts(one) for one in scored), tuple(
            self._said(warning) for one in scored for warning in one.warnings
        )

    def score(self, responses: ResponseSet) -> ScoredResponses:
        """Scores of policy models' responses, and what was cut or went wrong."""
        if isinstance(self.model, RemoteScorerConfig):
            found = score_remotely(responses, self.model)
            return ScoredResponses(scores=found.scores, warnings=tuple(map(self._said, found.warnings)))
        scored = score_responses(self.model, responses)
        summary = scored.summary
        return ScoredResponses(
            scores=scored.scores,
            summary=summary,
            warnings=tuple(
                self._said(f"{count:,} of {summary.texts:,} responses were scored with their {what} cut.")
                for what, count in (("prompt", summary.prompts_cut), ("text", summary.responses_cut))
                if count
            ),
        )

    def _said(self, warning: str) -> str:
        return f"{self.label}: {warning}"


def local_subjects(specs: tuple[RewardModelSpec, ...]) -> tuple[Subject, ...]:
    """Reward models on this machine, called by their folders; a baseline of the same name says that it is one.

    Raises:
        ModelError: There is no such folder.
        ConfigError: A hub id without a commit hash.
    """
    names = tuple(Path(spec.path).name for spec in specs)
    labels = names if len(set(names)) == len(names) else (f"{names[0]} (baseline)", *names[1:])
    return tuple(
        Subject(label=label, model=identify_reward_model(spec)) for label, spec in zip(labels, specs, strict=True)
    )


def _as_texts(scored: RemoteScores) -> ScoredTexts:
    return ScoredTexts(
        scores=scored.scores,
        cut=None,
        texts=scored.texts,
        prompts_cut=scored.prompts_cut,
        responses_cut=scored.responses_cut,
    )
