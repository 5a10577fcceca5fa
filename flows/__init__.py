"""What a person starts. Importing it prepares the environment, before Prefect and MLflow read theirs."""

from flows.settings import prepare_environment

prepare_environment()
