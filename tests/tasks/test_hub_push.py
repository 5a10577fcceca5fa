"""A push is a dry run unless asked otherwise; a real one puts the verified folder and its evidence on a loopback hub."""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from charm_core.errors import ArtifactError, ConfigError, ServiceError
from tasks.hub_push import HubConfig, promotion_card, push_version
from tasks.model_registry import ModelVersion, Move, RegisteredModel
from tasks.secrets import use_secrets
from tasks.store import ArtifactStore
from tests.push_hub_server import TOKEN, Hub, serve_push_hub

# the hub's own client uses its HTTP client's old way to send a file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\nlibrary_name: transformers\n---\n\n# sample\n\n## Promotion gate\n\nThe gate does not pass.\n"
FORCED = Move(
    at=datetime(2026, 1, 2, tzinfo=UTC),
    action="force",
    before="",
    after="1",
    by="alice@workstation",
    reason="see [here](http://x) <b>",
    verdict="the gate does not pass (failed: mismatch_control)",
)
FILES = {"config.json": b"{}", "model.safetensors": b"\x01" * 5000, "README.md": CARD.encode()}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub here speaks Git LFS only
    with serve_push_hub() as served, use_secrets({"HF_TOKEN": TOKEN, "WRONG": "hf_other"}.get):
        yield served


def model_of(store: ArtifactStore, tmp_path: Path, files: dict[str, bytes], *moves: Move) -> RegisteredModel:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    released = store.write_folder(folder, "released_model")
    version = ModelVersion(version="1", tags={"released": released.model_dump_json()}, run_id="", ready=True)
    return RegisteredModel(
        name="charm-demo", champion=moves[-1].after if moves else None, versions=(version,), moves=moves
    )


@pytest.fixture
def model(store: ArtifactStore, tmp_path: Path) -> RegisteredModel:
    return model_of(store, tmp_path, FILES, FORCED)


def config(hub: Hub, **changed: object) -> HubConfig:
    return HubConfig.model_validate({"repository": "me/rm", "endpoint": hub.address, **changed})


def test_nothing_is_sent_by_default(store: ArtifactStore, model: RegisteredModel, hub: Hub):
    push = push_version(store, model, "1", config(hub))
    assert hub.requests == []
    assert push.commit is None
    assert {file.name: file.size for file in push.files if file.name != "README.md"} == {
        "config.json": 2,
        "model.safetensors": 5000,
    }
    digests = {file.name: file.digest for file in push.files}
    assert digests["model.safetensors"] == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert push.sentence().startswith("Nothing was sent (dry run). Would push version 1 to me/rm (main): 3 files")
    assert "it is made private" in push.sentence()


def test_a_dry_run_needs_no_secret(store: ArtifactStore, model: RegisteredModel):
    assert push_version(store, model, "1", HubConfig(repository="me/rm")).commit is None


def test_a_real_push_puts_exactly_that_there(store: ArtifactStore, model: RegisteredModel, hub: Hub):
    planned = push_version(store, model, "1", config(hub))
    push = push_version(store, model, "1", config(hub, dry_run=False))
    there = hub.repositories["me/rm"]
    assert {name: hashlib.sha256(data).hexdigest() for name, data in there.items()} == {
        file.name: file.digest for file in planned.files
    }
    assert there["README.md"].decode() == planned.card
    assert hub.private["me/rm"]
    assert hub.commits == ["Version 1 of charm-demo"]
    assert push.commit == f"{hub.address}/me/rm/commit/{'c' * 40}"
    assert push.sentence().startswith("Pushed version 1 to me/rm (main)")


def test_weights_of_an_earlier_version_do_not_stay(store: ArtifactStore, model: RegisteredModel, hub: Hub):
    hub.repositories["me/rm"] = {"model-00001-of-00002.safetensors": b"old", "figure.png": b"mine"}
    hub.private["me/rm"] = True
    push_version(store, model, "1", config(hub, dry_run=False))
    assert set(hub.repositories["me/rm"]) == {*FILES, "figure.png"}


def test_a_public_repository_is_refused_unless_public_is_meant(store: ArtifactStore, model: RegisteredModel, hub: Hub):
    hub.repositories["me/rm"], hub.private["me/rm"] = {}, False
    with pytest.raises(ConfigError, match=r"me/rm exists and is public; set push.private to false"):
        push_version(store, model, "1", config(hub, dry_run=False))
    assert hub.repositories["me/rm"] == {}
    push_version(store, model, "1", config(hub, dry_run=False, private=False))
    assert set(hub.repositories["me/rm"]) == set(FILES)


def test_the_card_carries_the_evidence_and_how_it_was_promoted(model: RegisteredModel):
    card = promotion_card(CARD, model, "1")
    assert card.startswith(CARD.rstrip())
    assert "Version 1 of `charm-demo` is the champion." in card
    assert "version 1 promoted by force by the maintainers" in card
    assert "failed: mismatch\\_control" in card
    assert "alice" not in card  # nobody's account is published
    assert "see \\[here\\](http://x) \\<b\\>" in card  # somebody's text is no markup
    rolled_back = FORCED.model_copy(update={"action": "roll back", "before": "1", "after": "0"})
    later = model.model_copy(update={"champion": "0", "moves": (FORCED, rolled_back)})
    assert "is not the champion any more" in promotion_card(CARD, later, "1")
    assert "rolled back from version 1 to 0" in promotion_card(CARD, later, "1")


def test_what_was_never_champion_is_not_pushed(store: ArtifactStore, tmp_path: Path, hub: Hub):
    with pytest.raises(ConfigError, match=r"version 1 of charm-demo was never champion \(gate: not judged\)"):
        push_version(store, model_of(store, tmp_path, FILES), "1", config(hub, dry_run=False))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**FILES, "modeling.py": b"x"}, r"\['modeling.py'\] run code when they are loaded"),
        ({**FILES, "pytorch_model.bin": b"x"}, r"\['pytorch_model.bin'\] run code"),
        ({"README.md": b"# x", "config.json": b"{}"}, "has no .safetensors file"),
    ],
)
def test_a_folder_that_nobody_should_load_is_not_pushed(
    store: ArtifactStore, tmp_path: Path, hub: Hub, files: dict[str, bytes], message: str
):
    with pytest.raises(ConfigError, match=message):
        push_version(store, model_of(store, tmp_path, files, FORCED), "1", config(hub, dry_run=False))
    assert hub.requests == []


def test_damaged_weights_are_not_pushed(store: ArtifactStore, model: RegisteredModel, hub: Hub, tmp_path: Path):
    (weights,) = (tmp_path / "store").rglob("model.safetensors")
    weights.chmod(0o644)
    weights.write_bytes(b"\x02" * 5000)
    with pytest.raises(ArtifactError):
        push_version(store, model, "1", config(hub, dry_run=False))
    assert hub.requests == []


def test_a_token_that_may_not_write_is_named_not_shown(store: ArtifactStore, model: RegisteredModel, hub: Hub):
    with pytest.raises(ServiceError, match=r"refuses the push to me/rm \(401\); the secret WRONG must allow") as caught:
        push_version(store, model, "1", config(hub, dry_run=False, token="WRONG"))
    assert "hf_other" not in str(caught.value)
    assert hub.repositories == {}


def test_a_missing_token_is_named(store: ArtifactStore, model: RegisteredModel, hub: Hub):
    with pytest.raises(ConfigError, match="there is no secret 'NOBODY'"):
        push_version(store, model, "1", config(hub, dry_run=False, token="NOBODY"))


def test_a_hub_that_does_not_answer_is_a_service_error(store: ArtifactStore, model: RegisteredModel, hub: Hub):
    with pytest.raises(ServiceError, match="the hub does not answer"):
        push_version(store, model, "1", config(hub, dry_run=False, endpoint="http://127.0.0.1:9"))


def test_an_upload_that_breaks_off_makes_no_commit(store: ArtifactStore, model: RegisteredModel, hub: Hub):
    hub.refused_uploads = 400
    with pytest.raises(ServiceError, match=r"model\.safetensors.*No commit was made"):
        push_version(store, model, "1", config(hub, dry_run=False))
    assert hub.commits == []
    hub.refused_uploads = 0
    push_version(store, model, "1", config(hub, dry_run=False))
    assert set(hub.repositories["me/rm"]) == set(FILES)


@pytest.mark.parametrize(
    "wrong", [{"endpoint": "http://hub.example.org"}, {"endpoint": "http://127.0.0.1.evil.org"}, {"repository": "rm"}]
)
def test_addresses_that_would_leak_the_token_and_half_names_are_refused(wrong: dict[str, str]):
    with pytest.raises(ValidationError):
        HubConfig.model_validate({"repository": "me/rm", **wrong})
