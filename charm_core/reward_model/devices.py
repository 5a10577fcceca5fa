"""What there is to compute on."""

import torch


def gpu_count() -> int:
    """GPUs that this process sees, asked of torch without making a CUDA context."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
