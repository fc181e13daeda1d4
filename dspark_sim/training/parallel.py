"""Several processes on one run, as torchrun starts them: each takes a share of every update, gradients are summed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dspark_sim.engine.models import resolve_device
from dspark_sim.errors import UserError


@dataclass(frozen=True)
class Processes:
    """A process among all: its rank from 0, how many there are, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one exchange."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(summed.view_as(tensor))


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the other processes that torchrun started; alone without it.

    Parameters
    ----------
    device
        ``auto``, ``cpu``, ``cuda`` or, for a process alone, ``cuda:N``. Several processes take a GPU each.

    Raises
    ------
    UserError
        If the device is not there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(0, 1, resolve_device(device))
        return
    if ":" in device:
        raise UserError(
            f"device is {device!r} and there are {world} processes; leave it at auto, so each takes its own"
        )
    place = resolve_device(device)
    if place.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}; start no more "
                "processes than GPUs"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world, place)
        # Nobody leaves while the first process still writes: the others would break its connections.
        dist.all_reduce(done := torch.zeros(1, device=place))
        done.item()
    finally:
        dist.destroy_process_group()
