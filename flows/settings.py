"""The only reader of the environment: where things are kept, and what the servers are called."""

import logging
import os
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from charm_core.errors import ConfigError, ServiceError
from tasks.addresses import shown_address
from tasks.nodes import NodeSettings, read_hosts
from tasks.scoring_settings import RayCluster, ScoringProcesses, ScoringSettings
from tasks.store import ArtifactStore
from tasks.tracking_settings import TrackingSettings

CHECKOUT = Path(__file__).resolve().parent.parent

_ENVIRONMENT_DEFAULTS = {
    # nothing is reported to anybody unless the user says so
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # it would print an address before it closes a run, and leave the run open where nobody reads that any more
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # the temporary server of a run without one needs about 20 s here, more on a busy machine
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    # it is stopped in the middle of its housekeeping, of which it then complains at length
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
}


_PASSED_ON = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "HF_HOME", "HF_HUB_OFFLINE")
"""Beginnings of variables that ranks on other machines get from the flow's: how to talk to each other, where models are."""


class RuntimeSettings(BaseSettings):
    """Environment variables ``CHARM_…``. None of them changes a result.

    The store and the tracking URI can also be kept on the Prefect server, for all of its workers: in a Secret block, which is for
    what holds a password, or a Variable. The server is asked when they are needed and the environment does not say.
    """

    model_config = SettingsConfigDict(env_prefix="CHARM_", env_ignore_empty=True, frozen=True, extra="ignore")

    home: Path = Field(
        default=CHECKOUT / ".charm", description="Folder for everything that CHARM keeps on this machine."
    )
    store: str | None = Field(
        default=None,
        description="Folder or fsspec URL of the artifact store; default: Prefect's block charm-store or variable charm_store, or else "
        "home/store.",
    )
    tracking_uri: str | None = Field(
        default=None,
        description="MLflow tracking URI; default: Prefect's block charm-tracking-uri or variable charm_tracking_uri, or else SQLite "
        "in home.",
    )
    experiment: str = Field(default="charm", description="MLflow experiment.")
    mlflow_ui_url: str | None = Field(
        default=None, description="Where people open the MLflow pages, if not at the tracking URI."
    )
    cpu_jobs: int | None = Field(
        default=None,
        ge=1,
        description="Most model processes (training, scoring, answering) at a time on a machine without a GPU; default: no "
        "limit. On a GPU it is always one.",
    )
    scoring_processes: int | None = Field(
        default=None,
        ge=1,
        description="Processes that score side by side, each with a share of the prompts; default: one per GPU, or without one two for "
        "a reward model of less than 1 GB, else one.",
    )
    shard_texts: int = Field(
        default=50_000,
        ge=1,
        description="Responses per shard of a scoring, at most and on average: what an interruption loses at most. Each shard loads "
        "the reward model.",
    )
    ray_address: str | None = Field(
        default=None,
        description="Ray cluster that the shards of a scoring are spread over, host:port of its head; default: they are done on this "
        "machine, one after another.",
    )
    ray_cores: int = Field(default=1, ge=1, description="Cores of a shard on the Ray cluster.")
    ray_gpus: int | None = Field(
        default=None, ge=0, description="GPUs of a shard on the Ray cluster; default: one if the cluster has any."
    )
    scoring_deployment: str | None = Field(
        default=None,
        description="Deployment whose Prefect workers do the shards of a scoring, such as score-shard/workers; default: they are "
        "done on this machine, one after another.",
    )
    nodes: str | None = Field(
        default=None,
        description="Machines that one training spreads over, separated by commas, or a hostfile with one a line; the flow's own "
        "first, by the name under which the others reach it. Default: the flow's own alone.",
    )
    remote_shell: str = Field(
        default=NodeSettings.model_fields["remote_shell"].default,
        description="Starts a command on one of the nodes: ssh, or srun within an allocation.",
    )
    nodes_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Port of the flow's machine where the other nodes wait for orders (python -m tasks.node HOST:PORT), as a "
        "scheduler has started them; default: they are started through the remote shell.",
    )

    def artifact_store(self) -> ArtifactStore:
        """The artifact store.

        Raises:
            ConfigError: Its address holds a password or a key.
        """
        home = self.home.expanduser().resolve()
        url = self.store or _kept_by_prefect("CHARM_STORE") or str(home / "store")
        _check_store(url)
        if "://" not in url:
            url = str(Path(url).expanduser().resolve())
        return ArtifactStore(url=url, work_folder=str(home / "work"))

    def digest_memo(self) -> Path:
        """Where digests of the user's model files are remembered."""
        return self.home.expanduser().resolve() / "digests"

    def scoring(self) -> ScoringSettings:
        """How scoring is done.

        Raises:
            ConfigError: Other machines are named, and no Prefect server that they could report to; or two kinds of them.
        """
        from prefect.settings import PREFECT_API_URL  # late: Prefect reads its own settings when it is imported

        elsewhere = {"CHARM_RAY_ADDRESS": self.ray_address, "CHARM_SCORING_DEPLOYMENT": self.scoring_deployment}
        named = [f"{name}={value}" for name, value in elsewhere.items() if value is not None]
        if len(named) > 1:
            raise ConfigError(
                f"{' and '.join(named)}: shards are done on a Ray cluster or on Prefect workers; unset one"
            )
        if named and not PREFECT_API_URL.value():
            raise ConfigError(
                f"{named[0]}, but no Prefect server is named: the other machines report to one, so start `prefect server start` "
                f"where all of them reach it, and set PREFECT_API_URL"
            )
        ray = None
        if self.ray_address is not None:
            ray = RayCluster(address=self.ray_address, cores=self.ray_cores, gpus=self.ray_gpus)
        return ScoringSettings(
            processes=ScoringProcesses(number=self.scoring_processes),
            shard_texts=self.shard_texts,
            ray=ray,
            deployment=self.scoring_deployment,
        )

    def node_settings(self) -> NodeSettings | None:
        """Over which machines a training is spread; None: it stays on this one.

        Raises:
            ConfigError: A hostfile cannot be read.
        """
        hosts = () if self.nodes is None else read_hosts(self.nodes)
        if len(hosts) < 2:
            return None
        passed_on = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        return NodeSettings(hosts=hosts, remote_shell=self.remote_shell, port=self.nodes_port, environment=passed_on)

    def tracking(self) -> TrackingSettings:
        """Where runs are remembered."""
        home = self.home.expanduser().resolve()
        uri = self.tracking_uri or _kept_by_prefect("CHARM_TRACKING_URI")
        if uri:
            return TrackingSettings(uri=_without_login(uri), experiment=self.experiment, ui_url=self.mlflow_ui_url)
        home.mkdir(parents=True, exist_ok=True)
        return TrackingSettings(
            uri=f"sqlite:///{home / 'mlflow.db'}",
            artifact_location=(home / "mlflow-artifacts").as_uri(),
            experiment=self.experiment,
            ui_url=self.mlflow_ui_url,
        )


def find_secret(name: str) -> str | None:
    """The value of a secret: the environment variable of that name or, without one, the Prefect Secret block."""
    value = os.environ.get(name)
    if value:
        return value
    return _secret_block(name)


def _secret_block(name: str) -> str | None:
    from prefect.blocks.system import Secret  # late: Prefect reads its own settings when it is imported

    try:
        # names of blocks have neither capitals nor underscores
        block = cast("Secret[str]", Secret.load(name.lower().replace("_", "-")))
        return str(block.get())
    except ValueError:  # there is no such block
        return None


def _kept_by_prefect(name: str) -> str | None:
    """What the Prefect server keeps under that name, in a Secret block or a Variable; nothing if no server is named.

    Raises:
        ServiceError: It does not answer.
    """
    import httpx
    from prefect.settings import PREFECT_API_URL
    from prefect.variables import Variable

    server = PREFECT_API_URL.value()
    if not server:
        return None
    try:
        value = _secret_block(name) or Variable.get(name.lower())
    except httpx.HTTPError as error:
        raise ServiceError(
            f"the Prefect server at {shown_address(server)} cannot be asked for {name} ({error}): see that it answers, set {name} in "
            f"the environment, or unset PREFECT_API_URL"
        ) from None
    return str(value) if value else None


def _check_store(url: str) -> None:
    """The store's address becomes part of every reference to a file in it, and those are shown everywhere."""
    address = urlsplit(url) if "://" in url else None
    if address is not None and (address.password or address.query):
        raise ConfigError(
            f"the store's address {shown_address(url)} holds a password or a key: take it out of CHARM_STORE and give it to fsspec, "
            f"as FSSPEC_{address.scheme.upper()}_KEY and the like or in ~/.config/fsspec"
        )


def _without_login(uri: str) -> str:
    """A server's address without its login, which MLflow takes from the environment as well: a URI is shown in its messages."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https") or not address.username:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(address.username)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(address.password or "")
    return shown_address(uri)


def prepare_environment() -> None:
    """Set what Prefect and MLflow read from the environment, where the user has not."""
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in ("httpx", "httpcore"):  # they log the whole address of every request, and a token may be in it
        logging.getLogger(name).setLevel(logging.WARNING)
