"""Ranks that are killed with SIGKILL in the middle of a training."""

from collections.abc import Callable
from typing import Any

import psutil


def kill_a_rank_at(step: int, rank: int) -> Callable[[dict[str, Any]], None]:
    """A callback that kills one rank with SIGKILL once a step is done."""

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == step:
            ranks = [child for child in psutil.Process().children(recursive=True) if _is_rank(child)]
            if ranks:
                ranks[min(rank, len(ranks) - 1)].kill()

    return on_step


def _is_rank(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.NoSuchProcess:  # gone, or a zombie
        return False
    return "charm_core.reward_model.worker" in command and "torch.distributed.run" not in command
