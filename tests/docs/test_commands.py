"""The commands of the documentation do what its pages say.

Quickly, on every page: the syntax, the options of every flow against its own command line, what a command names in the checkout. Slowly:
each page's commands are run, one after the other in one shell, with stand-ins for what the reader has.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flows import presets, promote, runs, status
from flows.command_line import run_from_command_line
from flows.settings import CHECKOUT
from tests.docs.material import write_material
from tests.docs.pages import NEEDS, Block, all_blocks, blocks, pages, write_settings
from tests.docs.shell import run_blocks, shell_environment

COMMANDS = all_blocks("sh")
CHECKOUT_PATH = re.compile(r"(?:deployments|benchmarks|flows|tests|tasks|docs)/[\w./-]+")
MADE_BY_THE_READER = {"deployments/.env"}
RUN_HERE = [
    page for page in pages() if not page.startswith("extend/") and any(not block.title for block in blocks(page, "sh"))
]
"""Pages with commands that need nothing special. Those of the worked examples are run in a copy of the checkout."""
FLOWS = {
    "ablate": (runs.AblationRun, presets.ABLATE),
    "audit": (runs.AuditRun, presets.AUDIT),
    "calibrate": (runs.CalibrationRun, presets.CALIBRATE),
    "collect_ratings": (runs.CollectRatingsRun, presets.COLLECT_RATINGS),
    "evaluate": (runs.EvaluationRun, presets.EVALUATE),
    "post_train": (runs.PostTrainRun, presets.POST_TRAIN),
    "promote": (promote.PromoteRun, promote.PRESETS),
    "recalibrate": (runs.RecalibrationRun, presets.RECALIBRATE),
    "status": (status.StatusRun, status.PRESETS),
}


def flow_commands(block: Block) -> list[tuple[str, list[str]]]:
    """Every ``python -m flows.<name> options`` of a block."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words[:-1]):
            if word == "-m" and words[place + 1].startswith("flows."):
                rest = words[place + 2 :]
                end = next((i for i, one in enumerate(rest) if one in {">", "|", "&", "&&", ";"}), len(rest))
                found.append((words[place + 1].removeprefix("flows."), rest[:end]))
    return found


def checkout_of_links(folder: Path) -> None:
    """What the commands of a page find where they are given: the checkout, with an environment that is ready."""
    for path in CHECKOUT.iterdir():
        if not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (folder / "venv").mkdir()
    for path in Path(sys.prefix).glob("[!.]*"):
        (folder / "venv" / path.name).symlink_to(path)
    (folder / "venv" / ".ready").touch()  # nothing is installed


def test_pages_have_commands():
    assert {"first-run.md", "operations.md", "calibrate/one-gpu.md"} <= set(RUN_HERE)
    assert sum(len(flow_commands(block)) for block in COMMANDS) > 15


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_a_block_of_commands_is_right_as_far_as_can_be_seen_without_running_it(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert not block.title or block.title.startswith(NEEDS), "a title says what the commands need"
    checked = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    shown = {one.title for one in blocks(block.page, "python")}
    for name in CHECKOUT_PATH.findall(block.text):
        assert (CHECKOUT / name).exists() or name in {*shown, *MADE_BY_THE_READER}, f"{name} is not in the checkout"
    for target in re.findall(r"^make (\S+)$", block.text, re.MULTILINE):
        assert re.search(rf"^{target}:", (CHECKOUT / "Makefile").read_text(), re.MULTILINE), target
    if block.page.startswith("extend/"):
        return  # their settings are those of the copy with the example
    write_settings(block.page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, options in flow_commands(block):
        check_options(name, options)


def check_options(name: str, options: list[str]) -> None:
    if "--help" in options:
        return  # run with the page
    settings, named = FLOWS[name]
    written = [option for option in options if option != "--show-config"]
    missing = [word for word in written if word.endswith(".toml") and not Path(word).exists()]
    if missing:
        return  # made by an earlier command of the page
    status = run_from_command_line(name, settings, named, lambda _: pytest.fail("it ran"), [*written, "--show-config"])
    assert status == 0, f"{name} {options}"


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_HERE)
def test_the_commands_of_a_page_run_one_after_the_other(page: str, tmp_path: Path):
    checkout_of_links(tmp_path)
    write_material(tmp_path)
    write_settings(page, tmp_path)
    environment = shell_environment(tmp_path, CHECKOUT, VENV=str(tmp_path / "venv"))
    commands = [block for block in blocks(page, "sh") if not block.title]
    run_blocks(commands, tmp_path, environment, timeout=3000)
