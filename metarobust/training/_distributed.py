"""Joining the processes that train one model together."""

import os

import torch
from torch import distributed


def initialise_from_environment() -> torch.device:
    """Join the processes that ``torchrun`` started, and return the device of this one; the model goes there before ``fit``.

    With GPUs the backend is NCCL and each process gets the GPU of its local rank; otherwise it is gloo. Where ``torchrun`` did
    not start the program, nothing is joined, and the first GPU, or the CPU, is returned: one script serves both. At its end,
    call ``torch.distributed.destroy_process_group()`` if ``torch.distributed.is_initialized()``.

    Example:
        >>> initialise_from_environment().type in ("cpu", "cuda")
        True
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("nccl" if gpu else "gloo")
    return device
