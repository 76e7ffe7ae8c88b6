"""torch's own tensor parallelism: `parallelize_module`, every parameter a DTensor on the axis tp.

    tensor                       before        in use         style
    q, k, v, gate, up W, b       W[F_tp, D]    -              ColwiseParallel: of a whole input, some features
    o, down           W          W[D, F_tp]    -              RowwiseParallel: of some features, a term of the sum
    o, down           b          b[D]          b/n            a term of the same sum
    embedding, head   W          W[V_tp, D]    -              RowwiseParallel, ColwiseParallel: some words
    norm1, norm2, norm           w[D]          -              replicated, or SequenceParallel
    q_norm, k_norm               w[E]          -              SequenceParallel over heads: gradient {U_tp}, then summed
    hidden state      X          X[B, S, D]    -              with `sequence`, X[B, S_tp, D] outside the regions
    logits            Y          Y[B, S, V_tp] -              loss_parallel: never gathered

`W[F_tp, D]` reads: F cut over tp in chunks of ceil(F/n), so the last rank may hold less; `{U_tp}`: not yet summed over
tp. Between the regions tensors are plain local ones: dropout and the residual stream know nothing of DTensors. The
MLP's hidden features and the words need not divide. Heads must, queries' and keys', for a view of a DTensor cannot cut
a dimension unevenly; and with `sequence` columns must, for a local tensor becomes a DTensor of n equal parts.

Bytes sent by a rank for each microbatch: n ranks, L blocks, X bytes of hidden state [B, S, D].

    all_reduce       2 (n-1)/n X (4 L + 2)    twice a block in forward and in backward; embedding, input of the head
    all_reduce       2 (n-1)/n 3 B S numbers  the loss: maximum, sum of exponentials, the target's logit
    all_reduce       2 (n-1)/n B S top_k      numbers: gradients of a mixture's gate weights (_mixtures.py)

and once a step 2 (n-1)/n w for gradients of shared weights, each by itself; under FSDP or `replicate` (ddp.py), which
take gradients over, each time that they reduce; what FSDP has gathered as bfloat16, as that. With `sequence` each
all_reduce of X becomes a reduce_scatter and an all_gather, (n-1)/n X each, and inputs of linears are kept whole for
backward, not gathered again as our own does.
Memory: parameters, gradients and optimizer state are cut by n, but for norms and the biases of o and down.

Sources: Shoeybi et al., "Megatron-LM", 2019; Korthikanti et al., "Reducing Activation Recomputation", MLSys 2023.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from sandbox.batch import Batch
from sandbox.comm import Axis, ring_bytes
from sandbox.config import Config, that_do
from sandbox.config import Options as Base
from sandbox.engines.torch._dtensors import (
    adds_up,
    adopt,
    casts,
    microbatch_rows,
    own_rows,
    reductions,
    retie,
)
from sandbox.engines.torch._mixtures import cut_mixtures
from sandbox.engines.torch._styles import between, styles
from sandbox.errors import ConfigError
from sandbox.mesh import Mesh
from sandbox.model import Transformer, mixtures
from sandbox.model.dropout import Dropout
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, replace_parameters

AXIS = "tp"


class Options(Base):
    """Options of `tensor`."""

    sequence: bool = Field(False, description="cut norms and dropout by columns (SequenceParallel)")


def check(config: Config, options: Options) -> None:
    """Refuse what DTensors cannot be cut into."""
    degree, model = config.mesh.tp.degree, config.model
    equal = {"model.heads": model.heads, "model.kv_heads": model.groups}
    if options.sequence:
        equal["data.sequence"] = config.data.sequence
    rows = {"model.hidden": model.mlp_hidden, "model.vocab": model.padded_vocab}
    fit = [
        n
        for n in range(1, min(equal.values()) + 1)
        if not any(size % n for size in equal.values()) and all(own_rows(size, n, n - 1) for size in rows.values())
    ]
    for name, size in equal.items():
        if size % degree:
            raise ConfigError(
                f"mesh.tp.degree {degree} does not divide {name} {size}, and engine torch's DTensors cannot be viewed "
                f"as uneven parts. {that_do(fit, 'Degrees')} Engine native needs none to divide."
            )
    for name, size in rows.items():
        if not own_rows(size, degree, degree - 1):
            raise ConfigError(
                f"mesh.tp.degree {degree} leaves a rank without a part of {name} {size}. {that_do(fit, 'Degrees')}"
            )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with its parameters in DTensors cut over tp, and a loss that knows them."""
    # Here, for it takes 1.5 s, and predictions can do without.
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

    axis, model, device_mesh = mesh.axis(AXIS), program.model, mesh.submesh(AXIS)
    assert isinstance(model, Transformer)
    parallelize_module(model, device_mesh, styles(model, sequence=options.sequence), src_data_rank=None)
    retie(program)
    cut_mixtures(model, device_mesh, between(sequence=options.sequence))
    for module in model.modules():
        if any(not isinstance(param, DTensor) for param in module.parameters(recurse=False)):
            distribute_module(
                module,
                device_mesh,
                input_fn=cast(Any, lambda _, args, mesh: DTensor.from_local(args[0], mesh, (Replicate(),))),
                output_fn=lambda _, out, mesh: out.to_local(),
            )
        elif options.sequence and isinstance(module, Dropout):
            module.register_forward_pre_hook(lambda _, args: own_columns(axis, *args))
    layout = dict(program.layout)
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        (placement,) = param.placements
        if isinstance(placement, Shard):
            size, offset = compute_local_shape_and_global_offset(param.shape, device_mesh, (placement,))
            start = offset[placement.dim]
            layout[name] = layout[name].cut(placement.dim, start, start + size[placement.dim], axis.names)
    adopted = adopt(program, mesh, layout)
    final = False

    def begin(last: bool) -> None:
        nonlocal final
        program.begin(last)
        final = last

    def reduce_grads() -> None:
        for param in adopted.parameters.values() if final else ():
            if isinstance(param, DTensor) and isinstance(param.grad, DTensor):
                param.grad = param.grad.redistribute(placements=param.placements)  # sums what is a partial sum
        program.reduce_grads()

    def forward_backward(finished: Program, microbatches: list[Batch], valid: float) -> Tensor:
        with loss_parallel():  # backward too
            return program.forward_backward(finished, microbatches, valid)

    def evaluate(finished: Program, batch: Batch) -> Tensor:
        with loss_parallel():
            return program.evaluate(finished, batch)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return cast(DTensor, program.loss(logits, targets)).to_local()

    return replace(
        adopted,
        begin=begin,
        reduce_grads=reduce_grads,
        forward_backward=forward_backward,
        evaluate=evaluate,
        loss=loss,
    )


def own_columns(axis: Axis, x: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
    """A hidden state of this rank's columns, with the columns of the batch that belong to it."""
    return x, batch.take_columns(slice(axis.rank * x.shape[1], (axis.rank + 1) * x.shape[1]))


def cut(model: Transformer, options: Options, axis: Axis) -> int:
    """Cut the parameters of a model on the meta device; return the bytes of those whose gradients are partial sums."""
    dims = dict.fromkeys(("q", "k", "v", "gate", "up", "embed", "head"), 0) | dict.fromkeys(("o", "down"), 1)
    partial, new = 0, dict[str, nn.Parameter]()
    for name, param in model.named_parameters():
        *_, layer, _ = name.split(".")
        dim = dims.get(layer)
        if dim is not None and dim < param.dim():
            chunk = -(-param.shape[dim] // axis.size)
            size = own_rows(param.shape[dim], axis.size, axis.rank)
            new[name] = nn.Parameter(param.detach().narrow(dim, axis.rank * chunk, size).clone())
        elif layer in ("q_norm", "k_norm") or (options.sequence and "norm" in layer):
            partial += bytes_of([param])
    replace_parameters(model, new)
    return partial


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank."""
    axis = mesh.axis(AXIS)
    assert isinstance(model, Transformer)
    partial = cut(model, options, axis)
    first, last = mesh.axis("pp").rank == 0, model.head is not None
    once, blocks, own = model.dtype.itemsize, len(model.blocks), next(model.parameters()).element_size()
    stored = once if casts(config) else own  # as what the embedding's words are summed
    shared = once if casts(config) and not adds_up(config) else own
    number = (4 * blocks + last) * once + first * stored
    gathers, sums = (2, 1 + (config.model.dropout > 0)) if config.train.recompute == "full" else (0, 0)  # run again
    wide = torch.promote_types(model.dtype, torch.float32).itemsize
    terms, gates = 3 * last * wide, len(list(mixtures(model))) * config.model.top_k * wide
    traffic: dict[str, float] = defaultdict(float)
    for rows in microbatch_rows(mesh, config):
        tokens = rows * config.data.sequence
        across = ring_bytes(tokens * config.model.width, axis.size)
        if options.sequence:
            traffic[f"all_gather {AXIS}"] += (number + gathers * blocks * once) * across / 2
            traffic[f"reduce_scatter {AXIS}"] += (number + sums * blocks * once) * across / 2
        else:
            traffic[f"all_reduce {AXIS}"] += (number + sums * blocks * once) * across
        traffic[f"all_reduce {AXIS}"] += ring_bytes((terms + gates) * tokens, axis.size)
    traffic[f"all_reduce {AXIS}"] += reductions(config) * ring_bytes(partial * shared // own, axis.size)
    held = bytes_of(model.parameters())
    memory = {"parameters": held, "gradients": held, "optimizer": state_copies(config.train) * held}
    return Prediction(traffic, memory)
