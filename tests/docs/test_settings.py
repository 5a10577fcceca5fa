"""Every settings file and fragment that a page shows is one that the flows take."""

import tomllib

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter

from flows import runs
from tests.docs.pages import PART_OF, Block, all_blocks

FRAGMENTS = {
    "audit": runs.AuditRun,
    "calibrate": runs.CalibrationRun,
    "collect_ratings": runs.CollectRatingsRun,
    "evaluate": runs.EvaluationRun,
}
SETTINGS = all_blocks("toml")
DEPLOYMENTS = all_blocks("yaml")


def check_fragment(block: Block, settings: type[BaseModel]) -> None:
    """Each of its tables or values is right by itself; what the rest of the file says is not known."""
    for name, value in tomllib.loads(block.text).items():
        field = settings.model_fields.get(name)
        assert field is not None, f"{block}: {settings.__name__} has no {name}"
        TypeAdapter(field.annotation).validate_python(value)


@pytest.mark.parametrize("block", SETTINGS, ids=str)
def test_settings_that_are_shown_are_taken(block: Block):
    assert block.title, "its title is the name of its file, or says what it is part of"
    if block.title.startswith(PART_OF):
        check_fragment(block, FRAGMENTS[block.title.removeprefix(PART_OF)])
    else:
        # with the command that names it: test_commands.py, or test_worked_examples.py
        same_page = [one for one in all_blocks("sh") if one.page == block.page]
        assert any(f"--config {block.title}" in one.text for one in same_page), "no command uses it"


@pytest.mark.parametrize("block", DEPLOYMENTS, ids=str)
def test_deployments_that_are_shown_have_settings_that_are_taken(block: Block):
    assert block.title == "part of prefect.yaml"
    for deployment in yaml.safe_load(block.text):
        flow = deployment["entrypoint"].rpartition(".")[2]
        assert deployment["work_pool"]["name"] in ("cpu", "gpu")
        FRAGMENTS[flow].model_validate(deployment["parameters"]["run"])
