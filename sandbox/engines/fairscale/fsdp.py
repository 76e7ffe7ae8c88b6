"""FairScale's FSDP: each block's parameters flattened into one, cut in ranges, gathered on use, and freed.

    tensor            before        in use              after backward      after reduction
    parameter W       W[N_dp]       W[N]                W[N_dp]             W[N_dp]
    gradient  G       -             -                   G[N]{U_dp}          G[N_dp]
    optimizer M       M[N_dp]       -                   -                   M[N_dp]
    batch     X       X[B_dp, S]    -                   -                   -

N: elements of a unit, a block or the root with all that is left, end to end; `N_dp`: cut over dp in equal ranges, the
last ones padded; `{U_dp}`: not yet summed over dp.

Bytes sent by a rank for each microbatch, with P' bytes of parameters and padding, n ranks: (n-1)/n P' to all_gather for
forward, as much again for backward (the root is not freed in between, nor is any unit without `reshard_after_forward`),
and as much to reduce_scatter gradients. Memory: (2 + K)/n P', and the units in use.

Units are reduced one by one. By default FairScale reduces small ones together, and each gradient of a rank is then a
view that keeps all 25 MiB / n of the shared buffer alive.

FSDP averages, so each rank's loss is scaled by n. What the optimizer updates are views of the flat ranges, one for each
parameter, so that weight decay can spare vectors.

FairScale asks for CUDA's streams. On CPU its module is given a `torch` whose streams do nothing; in this process
`Tensor.record_stream` does nothing either, and two of its modules do without collectives that only NCCL has. Its
`clip_grad_norm_` moves the norm to a GPU, so the sandbox's stands in for it.

Source: FairScale 0.4.13; Rajbhandari et al., "ZeRO", SC 2020, 5.3.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.model import Transformer
from sandbox.predict import Prediction, state_copies
from sandbox.program import Program, materialise, shard_rows

AXIS = "dp"
REFUSES = {"float64": "its FSDP takes float32 parameters only, and says so."}


class Options(Base):
    """Options of `fsdp`."""

    reshard_after_forward: bool = Field(True, description="free parameters between forward and backward")


def check(config: Config, options: Options) -> None:
    """Raises UnsupportedError: replicas."""
    if config.mesh.dp.replicas > 1:
        raise UnsupportedError("mesh.dp.replicas: FairScale's FSDP has one group only. Set mesh.dp.replicas: 1.")


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with all its state cut in ranges over dp, and parameters gathered on use."""
    from fairscale.internal import reduce_scatter_bucketer
    from fairscale.internal.parallel import ProcessGroupName
    from fairscale.nn.data_parallel import FullyShardedDataParallel, fully_sharded_data_parallel

    device = program.initial(next(iter(program.parameters))).device
    if device.type == "cpu":
        _without_streams(fully_sharded_data_parallel)
        for module in (fully_sharded_data_parallel, reduce_scatter_bucketer):
            module.enable_nccl_base_collectives = False
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
    axis = mesh.axis("dp_shard", "cp")
    wrap = functools.partial(
        FullyShardedDataParallel,
        process_group=axis.group,
        process_group_reduce_scatter=ProcessGroupName.default,
        reshard_after_forward=options.reshard_after_forward,
        compute_device=device,
        bucket_cap_mb=0,
    )
    if not isinstance(program.model, Transformer):
        raise UnsupportedError("engine fairscale: its fsdp puts wrappers in the place of blocks, here only in ours.")
    materialise(program)
    blocks = program.model.get_submodule("blocks")
    for key, block in list(blocks.named_children()):
        setattr(blocks, key, wrap(block))
    model = wrap(program.model)
    places = {name: (flat, start, stop, at) for name, flat, start, stop, at in _places(model, axis.rank)}
    pieces = {
        name: nn.Parameter(flat.detach()[at : at + stop - start]) for name, (flat, start, stop, at) in places.items()
    }

    def forward_backward(finished: Program, microbatches: list[Batch], valid: float) -> Tensor:
        loss = program.forward_backward(finished, microbatches, valid / axis.size) / axis.size
        for name, (flat, start, stop, at) in places.items():
            pieces[name].grad = flat.grad[at : at + stop - start]
        return loss

    return replace(
        program,
        model=model,
        parameters=pieces,
        layout={
            name: program.layout[name].range(start, stop, axis.names) for name, (_, start, stop, _) in places.items()
        },
        shard_batch=shard_rows(program, mesh),
        forward_backward=forward_backward,
    )


def _places(model: nn.Module, rank: int) -> Iterator[tuple[str, Any, int, int, int]]:
    """Each parameter's name, its unit's flat range, the elements [start, stop) of it there, and where they begin."""
    for path, module in model.named_modules():
        flat: Any = getattr(module, "flat_param_0", None)
        if flat is None or not hasattr(module, "_fpw_module"):
            continue
        low, begin = rank * flat.numel(), 0
        for (inside, _, name), numel in zip(flat._param_infos, flat._param_numels, strict=True):
            start, stop = (min(max(low + edge - begin, 0), numel) for edge in (0, flat.numel()))
            words = [word for word in f"{path}.{inside}.{name}".split(".") if word not in WRAPPERS]
            if start < stop:
                yield ".".join(words), flat, start, stop, begin + start - low
            begin += numel


WRAPPERS = {"", "_fsdp_wrapped_module", "_fpw_module"}


def _without_streams(module: ModuleType) -> None:
    """Give `module` a torch whose CUDA has streams that do nothing, and its tensors no need of them."""

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream)

        __hash__ = object.__hash__

    cuda = SimpleNamespace(
        Stream=Stream,
        current_stream=Stream,
        is_available=lambda: True,
        stream=lambda stream: nullcontext(),
        synchronize=lambda: None,
    )
    stand_in = ModuleType("torch")
    stand_in.__dict__.update(torch.__dict__, cuda=cuda)
    module.torch = stand_in  # type: ignore[attr-defined]
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign, assignment]


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    axis, passes = mesh.axis("dp_shard", "cp"), config.train.microbatches
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.get_submodule("blocks").children()]
    root = sum(p.numel() for p in model.parameters()) - sum(blocks)
    gathered = scattered = held = own = 0
    for elements in (root, *blocks):
        part = -(-elements // axis.size) * 4
        twice = options.reshard_after_forward and elements is not root
        gathered += passes * (2 if twice else 1) * (axis.size - 1) * part
        scattered += passes * (axis.size - 1) * part
        held += part
        own += min(max(elements * 4 - axis.rank * part, 0), part)
    return Prediction(
        traffic={f"all_gather {axis.name}": gathered, f"reduce_scatter {axis.name}": scattered},
        memory={"parameters": held, "gradients": held, "optimizer": state_copies(config.train) * own},
    )
