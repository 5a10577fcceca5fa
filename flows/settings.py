"""The only reader of the environment: where things are kept, and what the servers are called."""

import os
from pathlib import Path
from typing import cast

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from tasks.store import ArtifactStore
from tasks.tracking import TrackingSettings

CHECKOUT = Path(__file__).resolve().parent.parent

_ENVIRONMENT_DEFAULTS = {
    # nothing is reported to anybody unless the user says so
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # the temporary server of a run without one needs about 20 s here, more on a busy machine
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
}


class RuntimeSettings(BaseSettings):
    """Environment variables ``CHARM_…``. None of them changes a result."""

    model_config = SettingsConfigDict(env_prefix="CHARM_", env_ignore_empty=True, frozen=True, extra="ignore")

    home: Path = Field(
        default=CHECKOUT / ".charm", description="Folder for everything that CHARM keeps on this machine."
    )
    store: str | None = Field(
        default=None, description="Folder or fsspec URL of the artifact store; default: home/store."
    )
    tracking_uri: str | None = Field(default=None, description="MLflow tracking URI; default: SQLite in home.")
    experiment: str = Field(default="charm", description="MLflow experiment.")
    mlflow_ui_url: str = Field(default="http://127.0.0.1:5000", description="Where people open the MLflow pages.")

    def artifact_store(self) -> ArtifactStore:
        """The artifact store."""
        home = self.home.expanduser().resolve()
        url = self.store or str(home / "store")
        if "://" not in url:
            url = str(Path(url).expanduser().resolve())
        return ArtifactStore(url=url, work_folder=str(home / "work"))

    def tracking(self) -> TrackingSettings:
        """Where runs are remembered."""
        home = self.home.expanduser().resolve()
        if self.tracking_uri:
            return TrackingSettings(uri=self.tracking_uri, experiment=self.experiment, ui_url=self.mlflow_ui_url)
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
    from prefect.blocks.system import Secret  # late: Prefect reads its own settings when it is imported

    try:
        # names of blocks have neither capitals nor underscores
        block = cast("Secret[str]", Secret.load(name.lower().replace("_", "-")))
        return str(block.get())
    except ValueError:  # there is no such block
        return None


def prepare_environment() -> None:
    """Set what Prefect and MLflow read from the environment, where the user has not."""
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
