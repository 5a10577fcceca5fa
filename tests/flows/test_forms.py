"""The run forms of Prefect's pages: every setting with title, description, default, choices and bounds; wrong values refused at once."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectAlreadyExists, ParameterTypeError, PrefectHTTPStatusError
from prefect.utilities.callables import parameter_schema

from flows import ablate, audit, calibrate, collect_ratings, evaluate, post_train, presets, promote, recalibrate
from flows.settings import CHECKOUT

FLOWS: dict[str, Flow[..., Any]] = {
    "ablate": ablate.ablate,
    "audit": audit.audit,
    "calibrate": calibrate.calibrate,
    "collect_ratings": collect_ratings.collect_ratings,
    "evaluate": evaluate.evaluate,
    "post_train": post_train.post_train,
    "promote": promote.promote,
    "recalibrate": recalibrate.recalibrate,
}
PRESETS: dict[str, dict[str, Any]] = {
    "ablate": presets.ABLATE,
    "audit": presets.AUDIT,
    "calibrate": presets.CALIBRATE,
    "collect_ratings": presets.COLLECT_RATINGS,
    "evaluate": presets.EVALUATE,
    "post_train": presets.POST_TRAIN,
    "promote": promote.PRESETS,
    "recalibrate": presets.RECALIBRATE,
}
BOUNDS = {"minimum", "exclusiveMinimum"}
Schema = dict[str, Any]


@pytest.fixture(scope="module")
def schemas() -> dict[str, Schema]:
    return {name: parameter_schema(flow).model_dump_for_openapi() for name, flow in FLOWS.items()}


def groups_below(part: object, definitions: Schema) -> set[str]:
    """What a person fills in; a parameter that an event brings is not meant."""
    found: set[str] = set()
    waiting = [part]
    while waiting:
        named = set(re.findall(r"'#/definitions/([^']+)'", str(waiting.pop()))) - found
        found |= named
        waiting += [definitions[name] for name in named]
    return found


@pytest.fixture(scope="module")
def fields(schemas: dict[str, Schema]) -> dict[str, tuple[int, Schema, Schema]]:
    """Every field of every group in every form: its place, itself, and the definitions that it can refer to."""
    found = {}
    for flow, schema in schemas.items():
        definitions = schema["definitions"]
        for group in sorted(groups_below(schema["properties"]["run"], definitions)):
            for place, (name, field) in enumerate(definitions[group].get("properties", {}).items()):
                found[f"{flow}: {group}.{name}"] = (place, field, definitions)
    return found


def choices_of(field: Schema) -> list[Schema]:
    return field.get("anyOf") or field.get("oneOf") or [field]


def described(field: Schema, definitions: Schema) -> str:
    """What Prefect's pages show below the title: of a group, what it says itself where its field says nothing else."""
    reference = field.get("$ref", "").rpartition("/")[2]
    return field.get("description") or definitions.get(reference, {}).get("description", "")


def test_every_flow_has_a_form_of_its_settings(schemas: dict[str, Schema]):
    deployed = {deployment["entrypoint"].split(".")[1] for deployment in deployments()}
    assert set(FLOWS) == set(PRESETS) == deployed - {"score_shard"}  # which scorings start, not people
    assert {name for name, schema in schemas.items() if "run" not in schema["properties"]} == set()
    assert {name for name, schema in schemas.items() if "default" not in schema["properties"]["run"]} == set()


def test_every_field_says_what_it_is(fields: dict[str, tuple[int, Schema, Schema]]):
    assert len(fields) > 200
    assert not [name for name, (_, field, _) in fields.items() if not field.get("title")]
    unsaid = [
        name for name, (_, field, known) in fields.items() if not described(field, known) and "const" not in field
    ]
    assert unsaid == []


def test_fields_are_in_the_order_in_which_they_are_declared(fields: dict[str, tuple[int, Schema, Schema]]):
    # the pages sort by position, and take a missing one for 0
    assert not [name for name, (place, field, _) in fields.items() if field.get("position") != place]


def test_every_number_has_a_bound(fields: dict[str, tuple[int, Schema, Schema]]):
    def unbounded(field: Schema) -> bool:
        inside = [
            item
            for choice in choices_of(field)
            for item in (choice, choice.get("items", {}), *choice.get("prefixItems", []))
        ]
        return any(one.get("type") in ("integer", "number") and not BOUNDS & one.keys() for one in inside)

    assert [name for name, (_, field, _) in fields.items() if unbounded(field)] == []


def test_choices_are_choices(schemas: dict[str, Schema]):
    training = schemas["calibrate"]["definitions"]["TrainingConfig"]["properties"]
    assert training["objective"]["enum"] == ["bradley_terry", "margin_regression", "win_rate_matching"]
    back_ends = schemas["audit"]["definitions"]["PolicyModel"]["properties"]["backend"]
    assert len(back_ends["oneOf"]) == 4


def deployments() -> list[dict[str, Any]]:
    return yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("flow", FLOWS)
def test_every_preset_can_be_chosen_as_a_deployment(flow: str):
    model = type(next(iter(PRESETS[flow].values()))())
    offered = [
        model.model_validate(deployment["parameters"].get("run", FLOWS[flow].fn.__defaults__[0].model_dump()))
        for deployment in deployments()
        if deployment["entrypoint"] == f"flows.{flow}.{flow}"
    ]
    for name, preset in PRESETS[flow].items():
        assert preset() in offered, f"preset {name} of {flow} has no deployment"


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("audit", {"offset_splits": -3}, "run.offset_splits"),
    ("audit", {"offset_split": 3}, "offset_split"),
    ("audit", {"mismatch": {"confidence": "high"}}, "run.mismatch.confidence"),
    ("calibrate", {"training": {"ranks": 0}}, "run.training.ranks"),
    ("calibrate", {"training": {"objective": "best"}}, "run.training.objective"),
    ("calibrate", {"calibration": {"smoothing": [1.0, -0.3]}}, "run.calibration.smoothing"),
    ("ablate", {"calibration": {}, "seeds": [1, -1]}, "run.seeds"),
    ("promote", {"version": "latest"}, "run.version"),
    ("collect_ratings", {"arena": {"source": "https://me:canary-secret@example.org/board.csv"}}, "run.arena"),
    ("collect_ratings", {"arena": {"source": "https://example.org/board.csv?token=canary-secret"}}, "run.arena"),
    ("evaluate", {"scorer": {"endpoint": {"base_url": "https://h/v1?key=canary-secret", "model": "m"}}}, "run.scorer"),
    (
        "evaluate",
        {"scorer": {"endpoint": {"base_url": "https://h/v1", "model": "m", "api_key": "canary-secret"}}},
        "run",
    ),
]


@pytest.fixture(scope="module")
def deployed(prefect_session: None) -> Iterator[tuple[SyncPrefectClient, dict[str, UUID]]]:
    """The flows as the server knows them: with their schemas."""
    with get_client(sync_client=True) as client:
        ids = {}
        for name in sorted({flow for flow, _, _ in WRONG}):
            flow = FLOWS[name]
            ids[name] = client.create_deployment(
                flow_id=client.create_flow(flow),
                name="form",
                parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
                enforce_parameter_schema=True,
            )
        yield client, ids


@pytest.mark.parametrize(("flow", "values", "place"), WRONG)
def test_the_server_refuses_a_wrong_value_before_there_is_a_run(
    deployed: tuple[SyncPrefectClient, dict[str, UUID]], flow: str, values: dict[str, Any], place: str
):
    client, ids = deployed
    runs = len(client.read_flow_runs())
    with pytest.raises((PrefectHTTPStatusError, ObjectAlreadyExists)) as refused:
        client.create_flow_run_from_deployment(ids[flow], parameters={"run": values})
    cause = refused.value if isinstance(refused.value, PrefectHTTPStatusError) else refused.value.http_exc
    assert cause.response.status_code == 409
    assert place in cause.response.json()["detail"]
    assert len(client.read_flow_runs()) == runs  # nothing is kept, a secret least of all


@pytest.mark.parametrize(
    ("flow", "values", "message"),
    [
        ("audit", {"simulation": {}, "arena": {"source": "x"}}, "give arena, unless it is simulated"),
        ("calibrate", {"simulation": {}, "reward_model": {"path": "x"}}, "a simulation brings its own"),
        ("collect_ratings", {"arena": {}}, "give a source or a snapshot"),
        ("promote", {"roll_back": True, "model": "m"}, "roll_back needs a reason"),
    ],
)
def test_what_no_form_can_know_the_flow_refuses_at_once(
    flow: str,
    values: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prefect_session: None,
):
    monkeypatch.setenv("CHARM_HOME", str(tmp_path / "home"))
    with pytest.raises(ParameterTypeError, match=message):
        FLOWS[flow](run=values)
    assert not (tmp_path / "home").exists()
