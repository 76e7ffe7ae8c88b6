"""An Accelerator for the processes that are there already, and the loop that Accelerate asks for."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.mesh import Mesh
from sandbox.program import ForwardBackward, Program, training_loss

__all__ = [
    "accumulate", "asked_of_transformers", "clip_with", "forget_launcher", "make_accelerator", "parallelism",
    "with_hooks",
]  # fmt: skip


def forget_launcher() -> None:
    """Forget what `accelerate launch` has read in its file, before any plugin heeds it: the sandbox's says it all."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")):
            del os.environ[name]


def make_accelerator(*, multi_device: bool = False, **settings: Any) -> Any:
    """An Accelerator of this rank, with `settings` of its constructor.

    `multi_device`: on CPU, Accelerate leaves out FSDP and ParallelismConfig, the first without a word. The code that
    it leaves out runs on gloo all the same, if only the kind of process does not read `MULTI_CPU`.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType

    from sandbox.engines.deepspeed import _quiet  # noqa: F401 - Accelerate imports it wherever it is installed

    # It takes ranks from the environment alone, though the process group is there
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(dist.get_world_size()))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or it would choose another number
    warnings.filterwarnings("ignore", "Slicing a flattened dim", UserWarning)  # deprecated, and used by Accelerate
    cpu = not torch.cuda.is_available()
    if multi_device and cpu:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(cpu=cpu and not multi_device, **settings)


def parallelism(mesh: Mesh) -> Any:
    """Accelerate's ParallelismConfig of `mesh`, over its process groups.

    Made by Accelerate they would be others of the same ranks, and FSDP cuts again only what DTensors of its own mesh
    have cut.
    """
    from accelerate import ParallelismConfig

    sizes = {f"{name}_size": mesh.axis(name).size for name in ("dp_replicate", "dp_shard", "tp")}
    config = ParallelismConfig(**sizes)
    assert mesh.device_mesh is not None
    joint = {"dp": config.dp_dim_names, "dp_shard_cp": config.dp_shard_cp_dim_names, "dp_cp": config.dp_cp_dim_names}
    if config.dp_shard_enabled and config.tp_enabled:
        joint["dp_shard_tp"] = ["dp_shard", "tp"]  # not of `build_device_mesh`: torch else sums norms twice, and warns
    for name, names in joint.items():
        if names:
            mesh.device_mesh[tuple(names)]._flatten(name)
    config.device_mesh = mesh.device_mesh
    return config


def accumulate(accelerator: Any, program: Program, mesh: Mesh) -> ForwardBackward:
    """Microbatches under `accelerator.accumulate`, whose last pass synchronises gradients.

    `accelerator.backward` divides by the number of microbatches, and what it synchronises is averaged over data ranks.
    The loss is already a share of the global sum, so it is scaled by both.
    """
    ranks, cut = mesh.data.size, mesh.axis("tp").size > 1

    def forward_backward(finished: Program, microbatches: list[Batch], valid: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=microbatches[0].tokens.device)
        for number, batch in enumerate(microbatches, 1):
            program.begin(number == len(microbatches))
            with accelerator.accumulate(finished.model), words_apart() if cut else nullcontext():
                loss = training_loss(finished, batch) / valid
                accelerator.backward(loss * ranks * len(microbatches))
            finished.reduce_grads()
            total += loss.detach()
        return total

    return forward_backward


@contextmanager
def asked_of_transformers() -> Iterator[None]:
    """While `prepare` runs, transformers has the name that Accelerate asks it for before FSDP over tp.

    transformers 5 has it no more. It is what replicates parameters that are no DTensors, and here there are none.
    """
    from transformers.integrations import tensor_parallel

    names = vars(tensor_parallel)
    absent = "ReplicateParallel" not in names
    if absent:
        names["ReplicateParallel"] = None
    try:
        yield
    finally:
        if absent:
            del names["ReplicateParallel"]


def words_apart() -> Any:
    """Where a loss, and backward, take logits that are cut over tp by words."""
    from torch.distributed.tensor.parallel import loss_parallel

    return loss_parallel()


def with_hooks(optimizer: Any) -> Any:
    """An AcceleratedOptimizer with the hooks of the one inside; it has none, as it skips torch's constructor."""
    inner = optimizer.optimizer
    optimizer.register_step_pre_hook = inner.register_step_pre_hook
    optimizer.register_step_post_hook = inner.register_step_post_hook
    return optimizer


def clip_with(accelerator: Any, parameters: Mapping[str, nn.Parameter], most: float | None) -> Tensor:
    """`Accelerator.clip_grad_norm_`, which takes DTensors too."""
    norm = accelerator.clip_grad_norm_(parameters.values(), float("inf") if most is None else most)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole.double()
