"""prefect.yaml as it is written: every deployment can be made and runs without parameters, and the event fits what it starts."""

import datetime
import importlib
import inspect
from fnmatch import fnmatchcase
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate

from flows.recalibrate import recalibrate
from flows.settings import CHECKOUT
from tasks.ratings.snapshots import BoardName
from tasks.recalibration import RATINGS_UPDATED, RatingsUpdate, SnapshotDate

DOCUMENT: dict[str, Any] = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())
DEPLOYMENTS: list[dict[str, Any]] = DOCUMENT["deployments"]
UPDATE = RatingsUpdate(
    model="charm-m",
    board=BoardName(publisher="p", category="overall", style_control=False),
    before=SnapshotDate(snapshot="a" * 64, date=datetime.date(2025, 2, 28)),
    after=SnapshotDate(snapshot="b" * 64, date=None),
    pairs=10,
    moved=2,
    largest=0.02,
    mean=None,
    why="it moved",
)


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    module, _, name = deployment["entrypoint"].rpartition(".")
    flow = getattr(importlib.import_module(module), name)
    assert isinstance(flow, Flow)
    return flow


def test_it_has_the_form_that_prefect_reads():
    read = PrefectYamlModel.model_validate(DOCUMENT)
    assert len(read.deployments) == len(DEPLOYMENTS)
    assert DOCUMENT["prefect-version"] == importlib.import_module("prefect").__version__


def test_names_are_told_apart_and_every_flow_has_a_deployment():
    names = [f"{flow_of(one).name}/{one['name']}" for one in DEPLOYMENTS]
    assert len(set(names)) == len(names)
    flows = {
        path.stem
        for path in (CHECKOUT / "flows").glob("*.py")
        if any(line.startswith("@flow") for line in path.read_text().splitlines())
    }
    assert {one["entrypoint"].split(".")[1] for one in DEPLOYMENTS} == flows


@pytest.mark.parametrize(
    "deployment",
    [one for one in DEPLOYMENTS if one["work_pool"]["name"] != "shards"],
    ids=lambda one: f"{one['entrypoint']}-{one['name']}",
)
def test_each_runs_without_parameters_and_says_what_it_is(deployment: dict[str, Any]):
    flow = flow_of(deployment)
    settings = inspect.signature(flow.fn).parameters["run"].default
    flow.validate_parameters({"run": settings} | deployment["parameters"])
    assert deployment["work_pool"]["name"] in ("cpu", "gpu")
    assert deployment["version"] == "{{ git.stdout }}"
    assert "charm" in deployment["tags"]
    assert len(deployment["description"]) > 40


def test_shards_are_given_out_by_scorings_alone():
    (shards,) = (one for one in DEPLOYMENTS if one["work_pool"]["name"] == "shards")
    schema = parameter_schema(flow_of(shards)).model_dump()
    assert schema["required"] == ["store", "model", "shard"]
    with pytest.raises(ValidationError, match="'store' is a required property"):
        validate(shards["parameters"], schema, raise_on_error=True)


def test_the_ratings_are_collected_once_a_day():
    (daily,) = (one for one in DEPLOYMENTS if one["entrypoint"].startswith("flows.collect_ratings"))
    (schedule,) = daily["schedules"]
    assert schedule["active"] is True
    assert len(schedule["cron"].split()) == 5
    assert schedule["cron"].endswith("* * *")


def test_the_event_starts_the_recalibration_with_what_it_says():
    triggered = [one for one in DEPLOYMENTS if "triggers" in one]
    assert [one["entrypoint"] for one in triggered] == ["flows.recalibrate.recalibrate"]
    (trigger,) = triggered[0]["triggers"]
    assert trigger["expect"] == [RATINGS_UPDATED]
    assert fnmatchcase("charm.reward-model.charm-m", trigger["match"]["prefect.resource.id"])
    assert trigger["parameters"] == {"update": "{{ event.payload }}"}
    schema = parameter_schema(recalibrate).model_dump()
    validate({"update": UPDATE.model_dump(mode="json")}, schema, raise_on_error=True)
    assert recalibrate.validate_parameters({"update": UPDATE.model_dump(mode="json")})["update"] == UPDATE
