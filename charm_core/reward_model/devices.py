"""What there is to compute on."""

import torch


def gpu_count() -> int:
    """GPUs that this process sees, asked of torch without making a CUDA context."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_ids() -> list[str]:
    """Ids of the GPUs that this process sees, in order; the same in every process, whatever CUDA_VISIBLE_DEVICES hides."""
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(gpu_count())]


def gpu_bytes() -> list[int]:
    """Memory of each GPU that this process sees."""
    return [int(torch.cuda.get_device_properties(number).total_memory) for number in range(gpu_count())]
