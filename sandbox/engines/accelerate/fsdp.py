"""Accelerate's FSDP2: `prepare` applies torch's `fully_shard` to each block, the last norm, and the rest.

    tensor            before        in use              after backward      after reduction
    parameter W       W[D_dp, F]    W[D, F]             W[D_dp, F]          W[D_dp, F]
    gradient  G       -             G[D, F]             G[D, F]{U_dp}       G[D_dp, F]
    optimizer M       M[D_dp, F]    -                   -                   M[D_dp, F]
    batch     X       X[B_dp, S]    -                   -                   -

`W[D_dp, F]` reads: rows cut over dp in chunks of ceil(D/n), so the last ranks may hold less, or nothing; `{U_dp}`: not
yet summed over dp.

Bytes sent by a rank in one step of M microbatches, with P' bytes of parameters, rows padded to a multiple of n: for
each microbatch (n-1)/n P' to all_gather for forward and as much again for backward, the norm and the root once for
both (and blocks too, without `reshard_after_forward`); and (n-1)/n P' to reduce_scatter, once a step, for under
`accumulate` gradients add up whole. With replicas (HSDP, `ParallelismConfig(dp_replicate_size, dp_shard_size)`) parts
are then summed over dp_replicate: 2 (r-1)/r P'/n. Memory: (2 + K)/n P and the padding, and between microbatches
gradients in full. Over tensor parallelism rows are cut again, within the part that a rank has: `tp_size` beside these.

On CPU Accelerate ignores its FSDP plugin without a word and trains under DDP (_accelerator.py tells how it is made to
run). The wrapping differs from engine torch's in the last norm, found by its type's name.

Source: Accelerate 1.15; Zhao et al., "PyTorch FSDP", VLDB 2023, and its FSDP2.
"""

import warnings
from dataclasses import replace

from pydantic import Field
from torch import nn

from sandbox.comm import ring_bytes
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.engines.accelerate._accelerator import (
    accumulate,
    asked_of_transformers,
    clip_with,
    forget_launcher,
    make_accelerator,
    parallelism,
    with_hooks,
)
from sandbox.engines.torch import _dtensors, fsdp
from sandbox.layout import Layout
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, state_copies
from sandbox.program import Program, make_optimizer, materialise, shard_rows

AXIS = "dp"


class Options(Base):
    """Options of `fsdp`."""

    reshard_after_forward: bool = Field(True, description="free a block's parameters between forward and backward")


check = fsdp.check


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with model and optimizer prepared by Accelerate."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    forget_launcher()
    axis = mesh.axis("dp_shard")
    blocks = {type(block).__name__ for block in program.model.get_submodule("blocks").children()}
    accelerator = make_accelerator(
        multi_device=True,
        gradient_accumulation_steps=program.config.train.microbatches,
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap" if blocks else "no_wrap",
            transformer_cls_names_to_wrap=sorted(blocks) or None,
            reshard_after_forward=options.reshard_after_forward,
            cpu_ram_efficient_loading=False,
        ),
        parallelism_config=parallelism(mesh),
    )
    whole = replace(program, parameters=materialise(program))
    plain = program.config.train.optimizer != "adamw"  # for DTensors torch has no fused SGD
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of a view: nothing is written to in place
    with asked_of_transformers():
        model, optimizer = accelerator.prepare(program.model, make_optimizer(whole, fused=not plain))
    parameters, layout = dict(model.named_parameters()), dict[str, Layout]()
    for name, box in program.layout.items():
        size, offset = compute_local_shape_and_global_offset(box.size, mesh.submesh("dp_shard"), (Shard(0),))
        layout[name] = box.cut(0, offset[0], offset[0] + size[0], axis.names)
    return replace(
        program,
        model=model,
        parameters=parameters,
        layout=layout,
        shard_batch=shard_rows(program, mesh),
        forward_backward=accumulate(accelerator, program, mesh),
        make_optimizer=lambda finished: with_hooks(optimizer),
        clip=lambda finished, most: clip_with(accelerator, parameters, most),
    )


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    axis, replicate = mesh.axis("dp_shard"), mesh.axis("dp_replicate")
    item = next(model.parameters()).element_size()
    inside = {id(p) for p in model.get_submodule("blocks").parameters()}
    gathered = padded = held = 0
    for param in model.parameters():
        part = -(-param.shape[0] // axis.size) * param[0].numel() * item  # padded: ceil(D/n) rows
        twice = options.reshard_after_forward and id(param) in inside
        gathered += config.train.microbatches * (2 if twice else 1) * (axis.size - 1) * part
        padded += part
        held += _dtensors.own_rows(param.shape[0], axis.size, axis.rank) * param[0].numel() * item
    return Prediction(
        traffic={
            f"all_gather {axis.name}": gathered,
            f"reduce_scatter {axis.name}": (axis.size - 1) * padded,
            f"all_reduce {replicate.name}": ring_bytes(padded, replicate.size),
        },
        memory={"parameters": padded, "gradients": padded, "optimizer": state_copies(config.train) * held},
    )
