"""Training in one process and in two: time of a step at the same global batch, and what it sends.

Processes exchange through gloo on this machine. A process has one thread, so that two of them have
twice the cores of one; a row of one process with two threads tells what threads alone would give.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import statistics
import sys
import time
from pathlib import Path

import torch

from .cases.training import image_step, token_step
from .grid import grid, number

# (processes, threads in each)
RUNS = ((1, 1), (1, 2), (2, 1))
STEPS = {"unet-small, batch 16, 256×256": 8, "token-mlp, 1024 tokens of 64": 60}
EXCHANGES = 20
LONGEST = 300.0  # seconds that a run may take


def run(quick: bool) -> list[dict]:
    """A row for each network and each of RUNS that this machine has the cores for."""
    rows = []
    for network, steps in STEPS.items():
        for count, threads in RUNS:
            if count * threads > (os.cpu_count() or 1) or (quick and network.startswith("unet")):
                continue
            print(f"  {network}, {count} × {threads}", file=sys.stderr, flush=True)
            found = _run(network, count, threads, 3 if quick else steps)
            rows.append({"network": network, "processes": count, "threads": threads, **found})
    return rows


def sent(parameters: int, processes: int) -> float:
    """Bytes that each process sends in a step: a ring passes every part of the vector of float32
    gradients, the loss and two requests once to add it up and once to hand it round, N - 1 of N
    parts each time."""
    return 2 * (processes - 1) / processes * 4 * (parameters + 3)


def lines(rows: list[dict]) -> list[str]:
    """The Markdown table."""
    text = [
        "## Several processes", "",
        "Median step at the same global batch, in processes that exchange through gloo on this "
        "machine; speed-up against one process with one thread. Exchange: one all-reduce of a "
        "step's vector alone. Sent: bytes from each process in a step, by the formula 2 (N - 1)/N "
        "4 (P + 3) for P parameters and N processes, and, as sent over the loopback device with "
        "all headers, counted by the kernel.", "",
    ]  # fmt: skip
    head = ["network", "processes × threads", "step ms", "speed-up", "exchange ms"]
    head += ["parameters", "sent MB", "counted MB"]
    table = []
    for row in rows:
        first = next(r for r in rows if r["network"] == row["network"])
        counted = row["counted_bytes"]
        table.append(
            [
                row["network"],
                f"{row['processes']} × {row['threads']}",
                number(row["ms"]),
                f"{first['ms'] / row['ms']:.2f}×",
                number(row["exchange_ms"]) if row["processes"] > 1 else "",
                f"{row['parameters']:,}",
                f"{sent(row['parameters'], row['processes']) / 1e6:.2f}",
                "not told" if counted is None else f"{counted / 1e6:.2f}",
            ]
        )
    return text + grid(head, table)


def _run(network: str, count: int, threads: int, steps: int) -> dict:
    """What the first of ``count`` new processes has measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_worker, args=(results, network, steps, threads, rank, count, port))
        for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    try:
        deadline = time.monotonic() + LONGEST
        while True:
            try:
                return results.get(timeout=1.0)
            except queue.Empty:
                failed = any(worker.exitcode not in (None, 0) for worker in workers)
                if failed or time.monotonic() > deadline:
                    raise RuntimeError(f"{network}: a process of {count} failed") from None
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()


def _worker(results, network, steps, threads, rank, count, port) -> None:
    from diffad_fast.training.distributed import processes, torchrun_group

    torch.set_num_threads(threads)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with torchrun_group("cpu"):
        trainer, step = (image_step if network.startswith("unet") else token_step)()
        step()
        times = [_seconds(step) for _ in range(steps)]
        together, vector = processes(), torch.zeros_like(trainer.optimizer.shared)
        together.add(vector)
        together.gathered(None)  # both are here
        before = _loopback()
        exchanges = [_seconds(lambda: together.add(vector)) for _ in range(EXCHANGES)]
        together.gathered(None)
        after = _loopback()
    if rank == 0:
        counted = None if before is None else (after - before) / EXCHANGES / count
        results.put(
            {
                "ms": 1e3 * statistics.median(times),
                "exchange_ms": 1e3 * statistics.median(exchanges),
                "parameters": len(trainer.optimizer.values),
                "counted_bytes": counted,
            }
        )


def _seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _loopback() -> int | None:
    """Bytes that this machine has sent to itself; None where the system does not tell."""
    try:
        text = Path("/proc/net/dev").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == "lo" and len(fields.split()) > 8:
            return int(fields.split()[8])
    return None
