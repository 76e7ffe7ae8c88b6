"""What a rank sends in a step and holds at most, whatever its engine. In a module of its own, for ranks import it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from work import trainer_of

from sandbox.runtime import Member

STEPS = 3


class Weight(NamedTuple):
    """Of one rank and one step, in bytes."""

    sent: float
    """By its collectives, each at the least that it can send."""
    wire: float
    """As the network interface counted it, headers and detours included; the mean over ranks."""
    tensors: int
    """The most that was alive at once in tensors."""
    resident: int | None
    """The most memory that the process had, less what it had before the trainer was made. None: the kernel won't say"""


def weigh(member: Member, sections: dict[str, Any], alone_on_lo: bool) -> Weight:
    """Train a few steps in a process that does nothing else."""
    import torch.distributed as dist

    from sandbox.measure import METRICS, Peak, Traffic, interface_bytes

    before = _status("VmRSS")
    trainer = trainer_of(member, sections)
    for _ in range(2):  # which allocate, open connections, and tell each other the order of buckets
        trainer.train_step()
    forgotten = _forget_peak()
    dist.barrier()
    start = interface_bytes() if alone_on_lo else 0
    dist.barrier()
    for _ in range(STEPS):
        trainer.train_step()
    dist.barrier()
    wire = (interface_bytes() - start) / STEPS / member.world if alone_on_lo else 0.0
    resident = _status("VmHWM") - before if forgotten else None
    with Peak(trainer.program, trainer.optimizer) as peak:
        trainer.train_step()
    recorder = trainer.mesh.recorder
    recorder.sent.clear()
    with nullcontext() if trainer.config.engine == "native" else Traffic(trainer.mesh):  # ours counts by itself
        trainer.train_step()
    sent = sum(count for key, count in recorder.sent.items() if key.split()[0] not in METRICS)
    return Weight(sent, wire, peak.bytes, resident)


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def _forget_peak() -> bool:
    """Have the kernel measure VmHWM from now on."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
