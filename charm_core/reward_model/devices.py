"""What there is to compute on, and how numbers get there and back without making it wait."""

import torch
from torch import Tensor


def gpu_count() -> int:
    """GPUs that this process sees, asked of torch without making a CUDA context."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_ids() -> list[str]:
    """Ids of the GPUs that this process sees, in order; the same in every process, whatever CUDA_VISIBLE_DEVICES hides."""
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(gpu_count())]


def gpu_bytes() -> list[int]:
    """Memory of each GPU that this process sees."""
    return [int(torch.cuda.get_device_properties(number).total_memory) for number in range(gpu_count())]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on its way from the CPU to a device, without waiting for what a GPU does just now."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Arriving:
    """Numbers on their way from a device: a GPU goes on meanwhile, also with what it is given later."""

    def __init__(self, tensor: Tensor) -> None:
        """Send a tensor off to the CPU."""
        self._there: torch.cuda.Event | None = None
        self._tensor = tensor.to("cpu", non_blocking=True)
        if tensor.is_cuda:
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record()

    def wait(self) -> list[float]:
        """The numbers, when they have come."""
        if self._there is not None:
            self._there.synchronize()
        return list(self._tensor.tolist())
