"""What is in deployments/ is read by the tools that will read it; nothing of it runs here: no Docker engine, no cluster, no Slurm."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flows.runs import CalibrationRun
from flows.settings import RuntimeSettings
from tasks.nodes import read_hosts

ROOT = Path(__file__).resolve().parent.parent
DEPLOYMENTS = ROOT / "deployments"
COMPOSE = [DEPLOYMENTS / "compose.yaml", DEPLOYMENTS / "compose.gpu.yaml"]
MANIFESTS = sorted((DEPLOYMENTS / "kubernetes").glob("*.yaml"))
SCRIPTS = sorted([*DEPLOYMENTS.rglob("*.sh"), *DEPLOYMENTS.rglob("*.sbatch")])
TOOLS = Path(sys.executable).parent
NEEDED = (
    "POSTGRES_PASSWORD",
    "PREFECT_SERVER_API_AUTH_STRING",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
)
WANTED = ("HF_TOKEN", "OPENAI_API_KEY")
ONE_SHOT = "deployments"

Config = dict[str, Any]


def run_tool(tool: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A tool of the development environment, which ships its own binary."""
    return subprocess.run(
        [str(TOOLS / tool), *map(str, arguments)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def compose(files: list[Path], **environment: str) -> subprocess.CompletedProcess[str]:
    named = [part for file in files for part in ("--file", file)]
    # no .env of a user's: the environment of the test only
    return run_tool("docker-compose", *named, "--env-file", os.devnull, "config", "--format", "json", **environment)


def secrets(suffix: str = "") -> dict[str, str]:
    return {name: f"canary-{name.lower()}{suffix}" for name in (*NEEDED, *WANTED)}


@pytest.fixture(scope="module", params=[COMPOSE[:1], COMPOSE], ids=["cpu", "gpu"])
def config(request: pytest.FixtureRequest) -> Config:
    done = compose(request.param, **secrets())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestCompose:
    @pytest.mark.parametrize("name", NEEDED)
    @pytest.mark.parametrize("given", [None, ""])
    def test_it_does_not_start_without_its_secrets(self, name: str, given: str | None):
        environment = {key: value for key, value in secrets().items() if key != name}
        done = compose(COMPOSE[:1], **environment, **({} if given is None else {name: given}))
        assert done.returncode != 0
        assert f"required variable {name} is missing a value" in done.stderr
        assert "canary" not in done.stderr

    def test_everything_is_published_on_this_machine_only(self, config: Config):
        ports = {name: service.get("ports", []) for name, service in config["services"].items()}
        assert {port["host_ip"] for of in ports.values() for port in of} == {"127.0.0.1"}
        assert {name: [port["target"] for port in of] for name, of in ports.items() if of} == {
            "prefect": [4200],
            "mlflow": [5000],
        }
        assert all("network_mode" not in service for service in config["services"].values())

    def test_every_secret_comes_from_the_environment(self, config: Config):
        telling = re.compile(r"PASSWORD|SECRET|AUTH_STRING|TOKEN|_KEY|CONNECTION_URL|STORE_URI")
        held = {
            (name, key): value
            for name, service in config["services"].items()
            for key, value in (service.get("environment") or {}).items()
            if telling.search(key)
        }
        assert len(held) > 12
        assert not {key for key, value in held.items() if "canary" not in value}
        commands = [str(service.get("command")) for service in config["services"].values()]
        assert not [command for command in commands if "canary" in command]  # everybody can read those

    def test_both_pages_ask_for_a_password(self, config: Config):
        services = config["services"]
        assert services["prefect"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
        assert "--app-name=basic-auth" in services["mlflow"]["command"]
        assert services["mlflow"]["environment"]["MLFLOW_AUTH_CONFIG_PATH"] == "/etc/charm/basic_auth.ini"

    def test_what_stays_up_says_whether_it_is_well(self, config: Config):
        for name, service in config["services"].items():
            if name == ONE_SHOT:
                assert (service["restart"], service["healthcheck"]) == ("no", {"disable": True})
            else:
                assert (service["restart"], "test" in service["healthcheck"]) == ("unless-stopped", True)
        waits = {
            (name, on): how["condition"]
            for name, service in config["services"].items()
            for on, how in service.get("depends_on", {}).items()
        }
        assert {how for (_, on), how in waits.items() if on != ONE_SHOT} == {"service_healthy"}
        assert {how for (_, on), how in waits.items() if on == ONE_SHOT} == {"service_completed_successfully"}

    def test_images_are_built_here_or_pinned(self, config: Config):
        images = {service["image"]: service.get("build") for service in config["services"].values()}
        foreign = [image for image, build in images.items() if build is None]
        assert foreign == ["postgres:17.5-bookworm"]
        targets = set(re.findall(r"^FROM .* AS (\S+)$", (DEPLOYMENTS / "Dockerfile").read_text(), re.MULTILINE))
        assert {build["target"] for build in images.values() if build} <= targets

    def test_what_must_last_is_in_volumes(self, config: Config):
        volumes = {volume["source"] for service in config["services"].values() for volume in service.get("volumes", [])}
        assert {"postgres", "mlflow", "charm-home"} == set(config["volumes"])
        assert set(config["volumes"]) < volumes
        binds = [volume for volume in volumes if volume.startswith("/")]
        assert all(Path(bind).exists() for bind in binds)

    def test_every_variable_is_in_the_example_and_none_has_a_value(self):
        text = "".join(file.read_text() for file in COMPOSE)
        read = set(re.findall(r"\$\{([A-Z_]+)", text))
        example = (DEPLOYMENTS / ".env.example").read_text()
        lines = re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", example, re.MULTILINE)
        assert {name for name, _ in lines} == read == {*NEEDED, *WANTED} | {n for n in read if n.startswith("CHARM_")}
        assert {name: value for name, value in lines if value and not name.startswith("CHARM_")} == {}
        assert ".env" in (DEPLOYMENTS / ".gitignore").read_text().splitlines()


def test_each_work_pool_is_made_and_has_a_worker(config: Config):
    document = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    used = {deployment["work_pool"]["name"] for deployment in document["deployments"]}
    made = re.search(r"^for pool in (.*); do$", (DEPLOYMENTS / "prepare_prefect.sh").read_text(), re.MULTILINE)
    commands = [service.get("command") or [] for service in config["services"].values()]
    served = {command[command.index("--pool") + 1] for command in commands if "--pool" in command}
    assert made is not None
    assert used == set(made[1].split())
    assert used - served == {"shards"}  # parts of a scoring are for workers of other machines


class TestImages:
    def test_the_linter_finds_nothing(self):
        done = run_tool("hadolint", "--failure-threshold", "style", DEPLOYMENTS / "Dockerfile")
        assert (done.returncode, done.stdout) == (0, "")

    def test_every_package_has_the_tested_version(self):
        pinned = {canonicalize_name(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().split()}
        pinned |= {"setuptools", "wheel"}  # what builds packages is whatever the day has, as in the Makefile
        text = (DEPLOYMENTS / "Dockerfile").read_text().replace("\\\n", " ")
        installs = re.findall(r"pip install (.*?)(?:&&|\n)", text)
        assert len(installs) == 6
        for install in installs:
            assert "--constraint constraints.txt" in install
            words = [
                word.strip("'") for word in re.sub(r"--(constraint|index-url) \S+|--editable", "", install).split()
            ]
            assert {canonicalize_name(Requirement(word).name) for word in words if not word.startswith(".")} <= pinned
        extra = [Requirement(text) for text in metadata.requires("mlflow") or []]
        login = {canonicalize_name(one.name) for one in extra if one.marker and one.marker.evaluate({"extra": "auth"})}
        assert login
        assert login <= pinned

    def test_what_is_copied_is_there_and_let_through(self):
        sources = {
            name.rstrip("/")
            for line in re.findall(r"^COPY (.*)$", (DEPLOYMENTS / "Dockerfile").read_text(), re.MULTILINE)
            for name in line.split()[:-1]
        }
        allowed = re.findall(r"^!(.*)$", (DEPLOYMENTS / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
        assert {"charm_core", "tasks", "flows", "prefect.yaml"} <= sources
        assert not {name for name in sources if not (ROOT / name).exists()}
        assert not {name for name in sources if name.split("/")[0] not in allowed}

    def test_nothing_runs_as_root(self):
        stages = re.split(r"^FROM ", (DEPLOYMENTS / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
        final = {stage.split(" AS ")[1].split()[0]: stage for stage in stages}
        assert all("\nUSER 1000\n" in final[target] for target in ("servers", "cpu", "cuda"))


def test_the_image_notes_its_revision_where_it_is_looked_for():
    dockerfile = (DEPLOYMENTS / "Dockerfile").read_text()
    assert dockerfile.count('RUN echo "${REVISION}" > REVISION') == 2


def test_yaml_is_tidy():
    rules = (
        "{extends: default, rules: {line-length: {max: 160}, document-start: disable, braces: {max-spaces-inside: 1}}}"
    )
    done = run_tool("yamllint", "--strict", "-d", rules, DEPLOYMENTS, ROOT / "prefect.yaml")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path):
    parsed = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, "")
    done = run_tool("shellcheck", script)
    assert (done.returncode, done.stdout) == (0, "")
    assert "set -euo pipefail" in script.read_text()


def options_of(command: list[str]) -> list[str]:
    words = " ".join(command).split()
    return [word.removeprefix("--") for word in words if word.startswith("--") and "." in word]


def is_setting(option: str) -> bool:
    schema = CalibrationRun.model_json_schema()
    part = schema
    for name in option.split("."):
        part = part.get("properties", {}).get(name)
        if part is None:
            return False
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
    return True


class TestKubernetes:
    @pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
    def test_the_manifests_are_what_kubernetes_expects(self, path: Path):
        done = run_tool("kubernetes-validate", "--strict", path)
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.parametrize("name", ["worker.yaml", "calibrate-job.yaml", "calibrate-job-nodes.yaml"])
    def test_pods(self, name: str):
        pod = workload(name)["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        claim = workload("storage.yaml")["metadata"]["name"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert claim in {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        # secrets by reference only
        assert container["envFrom"] == [{"secretRef": {"name": "charm-secrets"}}]
        assert not [one for one in container["env"] if re.search(r"PASSWORD|TOKEN|KEY|AUTH", one["name"])]
        assert all(is_setting(option) for option in options_of(container["command"]))

    @pytest.mark.parametrize("name", ["calibrate-job.yaml", "calibrate-job-nodes.yaml"])
    def test_the_gpus_of_a_job_are_asked_for_and_limited_alike(self, name: str):
        resources = workload(name)["spec"]["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "8"

    def test_the_pods_of_several_nodes_know_each_other_by_name(self):
        service, job = yaml.safe_load_all((DEPLOYMENTS / "kubernetes" / "calibrate-job-nodes.yaml").read_text())
        spec, pod = job["spec"], job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        environment = {one["name"]: one["value"] for one in container["env"]}
        # as Kubernetes names the pods of an indexed job that has a headless service
        assert spec["completionMode"] == "Indexed"
        assert service["spec"]["clusterIP"] == "None"
        names = [f"{job['metadata']['name']}-{number}.{pod['subdomain']}" for number in range(spec["completions"])]
        assert read_hosts(environment["CHARM_NODES"]) == tuple(names)
        assert pod["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
        assert spec["parallelism"] == spec["completions"]
        assert {name for name in environment if name.startswith("CHARM_")} <= variables()

    def test_the_script_of_several_nodes_is_sound(self):
        container = workload("calibrate-job-nodes.yaml")["spec"]["template"]["spec"]["containers"][0]
        shell, options, script = container["command"]
        assert (shell, options) == ("bash", "-euc")
        done = subprocess.run(
            [str(TOOLS / "shellcheck"), "--shell=bash", "-"], input=script, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "")
        assert "python -m tasks.node" in script


def workload(name: str) -> Config:
    """The last document of a manifest."""
    return list(yaml.safe_load_all((DEPLOYMENTS / "kubernetes" / name).read_text()))[-1]


def variables() -> set[str]:
    """The environment variables that CHARM knows."""
    return {f"CHARM_{name.upper()}" for name in RuntimeSettings.model_fields}


def test_slurm_spreads_a_training_over_the_nodes_that_it_asks_for():
    text = (DEPLOYMENTS / "slurm" / "calibrate.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert (int(asked["nodes"]) > 1, asked["ntasks-per-node"]) == (True, "1")
    (command,) = re.findall(r"-m flows.calibrate (.*) &$", text, re.MULTILINE)
    assert options_of(command.split()) == ["training.ranks"]
    assert all(is_setting(option) for option in options_of(command.split()))
    exported = set(re.findall(r"^(?:export )?(CHARM_[A-Z_]+)=", text, re.MULTILINE))
    assert exported == {"CHARM_HOME", "CHARM_NODES", "CHARM_REMOTE_SHELL"} <= variables()
