"""Several processes that train one model: torchrun starts them, torch.distributed joins them.

Every process holds the whole model and computes its share of each step's samples; one all-reduce a
step adds up gradients, loss and requests to stop. Of P parameters in float32 and N processes a ring
sends 2 (N - 1)/N 4 P bytes from each process in a step. The exchange is not overlapped with the
backward pass: for the models here it is short, and one vector keeps the sum, and with it the
result, the same whatever the network's layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from ..errors import ProcessError

T = TypeVar("T")


class Processes(NamedTuple):
    """Which of how many processes this is."""

    rank: int
    count: int

    @property
    def first(self) -> bool:
        """Does this process write files and show progress?"""
        return self.rank == 0

    def share_of(self, n: int) -> slice:
        """This process's part of n things, a multiple of the processes."""
        part = n // self.count
        return slice(self.rank * part, (self.rank + 1) * part)

    def add(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor``, on the device of the training, by its sum over the processes. Raises
        ProcessError."""
        if self.count > 1:
            with _named_errors(self):
                dist.all_reduce(tensor)

    @torch.no_grad()
    def equalise(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace ``tensors``, on the device of the training, by those of the first process. Raises
        ProcessError."""
        if self.count > 1:
            for tensor in tensors:
                sent = tensor.clone(memory_format=torch.contiguous_format)
                with _named_errors(self):
                    dist.broadcast(sent, src=0)
                tensor.copy_(sent)

    def agreed(self, value: T) -> T:
        """What the first process says. Raises ProcessError."""
        if self.count == 1:
            return value
        box = [value]
        with _named_errors(self):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in their order. Raises ProcessError."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        with _named_errors(self):
            dist.all_gather_object(values, value)
        return values


def unjoined() -> str | None:
    """What to tell one of several processes that have not joined, and each train for themselves."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1" or processes().count > 1:
        return None
    return (
        f"WORLD_SIZE is {count}, but the processes have not joined: each trains a model of its "
        "own. Call fit within diffad_fast.training.distributed.torchrun_group()"
    )


def processes() -> Processes:
    """This process among those joined; one of one where none are."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes(0, 1)


@contextmanager
def torchrun_group(device: str | None = None, timeout: float = 600.0) -> Iterator[str | None]:
    """Join the processes that torchrun started, and yield this one's device.

    device: as for :class:`diffad_fast.Detector`; a GPU becomes the one of this process's number on
    its machine. ``nccl`` exchanges between GPUs, ``gloo`` between CPUs. timeout: seconds to wait
    for another process. Without torchrun nothing happens and ``device`` comes back. A detector made
    with that device trains and scores together with those of the other processes:

        with torchrun_group() as device:
            detector = Detector(device=device).fit("tiles")
            if processes().rank == 0:
                detector.save("tiles.diffad")
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    on_gpu = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def _named_errors(processes: Processes) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) and (
            "closed by peer" not in str(error) and "gloo" not in str(error)
        ):
            raise
        raise ProcessError(
            f"process {processes.rank} of {processes.count} lost contact with the others "
            f"({str(error).splitlines()[0][:200]}): one of them has ended"
        ) from None
