"""torch's FSDP2 (`fully_shard`): every parameter a DTensor cut by rows, gathered block by block on use, and freed.

    tensor            before        in use              after backward      after reduction
    parameter W       W[D_dp, F]    W[D, F]             W[D_dp, F]          W[D_dp, F]
    gradient  G       -             -                   G[D, F]{U_dp}       G[D_dp, F]
    optimizer M       M[D_dp, F]    -                   -                   M[D_dp, F]
    batch     X       X[B_dp, S]    -                   -                   -

`W[D_dp, F]` reads: rows cut over dp in chunks of ceil(D/n), so the last ranks may hold less, or nothing; `{U_dp}`: not
yet summed over dp.

Bytes sent by a rank for each of M microbatches, with P' bytes of parameters, rows padded to a multiple of n:
(n-1)/n P' to all_gather for forward, as much again for backward, and as much to reduce_scatter gradients. A unit is a
block, or the root: embedding, norm and head, gathered once for both passes, as backward begins where forward ends.
Without `reshard_after_forward`, all is gathered once a step. With `sync: last` gradients add up whole, and are
scattered once. With replicas (HSDP) parts are summed over dp_replicate once a step: 2 (r-1)/r P'/n bytes more. In
bfloat16 parameters travel as bfloat16, but gradients as float32. Memory: (2 + K)/n P and the padding, two blocks and
the root in use.

Over tensor parallelism rows are cut again, within the part that a rank has. Each stage of a pipeline is a model with a
root of its own: its parameters are gathered once a step and its gradients scattered once, whatever the options.

Gradients are divided by 1, for the loss is already a share of the global sum. For another divisor than n torch asks
for PREMUL_SUM, which gloo lacks, unless told to use sums only.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023, and its FSDP2.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from sandbox.comm import ring_bytes
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.engines.torch._dtensors import adopt, own_rows, stages_of, units
from sandbox.errors import ConfigError
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, state_copies
from sandbox.program import Program, shard_rows

AXIS = "dp"


class Options(Base):
    """Options of `fsdp`."""

    reshard_after_forward: bool = Field(True, description="free parameters between forward and backward")
    sync: Literal["each", "last"] = Field("each", description="reduce after each microbatch, or after the last only")


def check(config: Config, options: Options) -> None:
    """Refuse replicas that leave nothing to cut."""
    dp = config.mesh.dp
    if dp.replicas == dp.degree:
        raise ConfigError(
            f"mesh.dp.replicas {dp.replicas}: with as many replicas as ranks, fsdp has nothing to cut. "
            "Set mesh.dp.replicas: 1, or mesh.dp.strategy: ddp."
        )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with all its state in DTensors cut over dp_shard, and parameters gathered on use."""
    # Here, for it takes 1.5 s, and predictions can do without.
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    axis, model, stages = mesh.axis("dp_shard"), program.model, stages_of(program.model)
    bf16 = program.config.train.dtype == "bfloat16"
    pipelined = mesh.axis("pp").size > 1
    free = options.reshard_after_forward and not pipelined
    for module in units(model):
        unit = fully_shard(
            module,
            mesh=mesh.submesh("dp_replicate", "dp_shard"),
            reshard_after_forward=None if module is model else free,  # None: torch decides
            mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy(),
        )
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    layout = {}
    for name, box in program.layout.items():
        size, offset = compute_local_shape_and_global_offset(box.size, mesh.submesh("dp_shard"), (Shard(0),))
        layout[name] = box.cut(0, offset[0], offset[0] + size[0], axis.names)

    def begin(final: bool) -> None:
        program.begin(final)
        for stage in () if pipelined else stages:  # a pipeline does it itself
            assert isinstance(stage, FSDPModule)
            stage.set_requires_gradient_sync(final or options.sync == "each")
            stage.set_requires_all_reduce(final)
            stage.set_reshard_after_backward(final or options.reshard_after_forward)

    adopted = adopt(program, mesh, layout)
    return replace(adopted, shard_batch=shard_rows(program, mesh), begin=begin)


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    axis, replicate = mesh.axis("dp_shard"), mesh.axis("dp_replicate")
    item = next(model.parameters()).element_size()
    short = 2 if config.train.dtype == "bfloat16" else item  # what is gathered
    passes, pipelined = config.passes, config.mesh.pp.degree > 1
    blocks = [list(block.parameters()) for block in model.get_submodule("blocks").children()]
    inside = {id(p) for block in blocks for p in block}
    root = [p for p in model.parameters() if id(p) not in inside]
    gathered = scattered = padded = held = 0
    replicas = 0.0
    for unit in (root, *blocks):
        part = sum(-(-p.shape[0] // axis.size) * p[0].numel() for p in unit)  # padded: ceil(D/n) rows
        uses = passes * (1 if unit is root else 2) if options.reshard_after_forward and not pipelined else 1
        gathered += uses * (axis.size - 1) * part * short
        scattered += (passes if options.sync == "each" else 1) * (axis.size - 1) * part * item
        replicas += ring_bytes(part * item, replicate.size)
        padded += part * item  # torch stores a shard with its padding
        held += sum(own_rows(p.shape[0], axis.size, axis.rank) * p[0].numel() * item for p in unit)
    return Prediction(
        traffic={
            f"all_gather {axis.name}": gathered,
            f"reduce_scatter {axis.name}": scattered,
            f"all_reduce {replicate.name}": replicas,
        },
        memory={"parameters": padded, "gradients": padded, "optimizer": state_copies(config.train) * held},
    )
