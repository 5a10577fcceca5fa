"""Commands of the documentation, run as a reader would run them: one shell, block after block, in one folder."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.docs.pages import Block
from tests.prefect_server import free_port


def shell_environment(folder: Path, checkout: Path, **more: str) -> dict[str, str]:
    """That of a reader who has just activated the virtual environment, and has no server."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CHARM_", "PREFECT_API_"))}
    return inherited | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "CHARM_HOME": str(folder / "charm-home"),
        "PREFECT_HOME": str(folder / "prefect-home"),
        **more,
    }


def run_blocks(commands: Sequence[Block], folder: Path, environment: dict[str, str], timeout: float) -> str:
    """Run blocks of commands in one shell and return what they print; the first command that fails ends them.

    The whole process group is ended afterwards, with the servers that a page starts. Those get a free port instead of
    the usual one.
    """
    port = str(free_port())
    environment = environment | {"PREFECT_SERVER_API_PORT": port}
    blocks = (f'echo "--- {block}" >&2\n{block.text.replace("4200", port)}' for block in commands)
    script = "set -euo pipefail\n" + "".join(blocks)
    log = folder / "commands.log"
    # to a file: a server that goes on would hold a pipe open
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(
        ["bash", "-c", script], cwd=folder, env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
    ) as shell:  # fmt: skip
        try:
            shell.wait(timeout=timeout)
        finally:
            _end_group(shell.pid)
    output = log.read_text(encoding="utf-8", errors="replace")
    assert shell.returncode == 0, f"status {shell.returncode}\n{output[-6000:]}"
    return output


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
