"""FairScale's model-parallel layers: linears of attention and MLP cut over tp, two sums a block in forward.

    tensor                       before         in use
    q, k, v, gate, up W, b       W[F_tp, D]     ColumnParallelLinear: own heads or features, of a whole input
    o, down           W          W[D, F_tp]     RowParallelLinear: from own heads or features, a term of the sum
    o, down           b          b[D]           added once, after the sum
    q_norm, k_norm               w[E]           on its own heads: gradient {U_tp}, summed in every backward
    embedding, norms, head                      whole, and computed by every rank alike

`W[F_tp, D]` reads: F is cut over axis tp in equal parts; `{U_tp}`: not yet summed over tp.

Bytes sent by a rank for each microbatch: n ranks, X bytes of hidden state [B, S, D], to all_reduce 2 (n-1)/n X twice a
block in forward, and in backward once for each of q, k, v, up and gate, where one sum for all layers of one input would
do; and 2 (n-1)/n w for w bytes of q_norm and k_norm, which FairScale leaves to its user. Here they are summed within
backward, so that DDP, ShardedDDP and FSDP, which take gradients over there, find the sums. Memory: parameters,
gradients and optimizer state of the cut linears by n, of all else in full.

Embedding and head stay whole: FairScale's want a vocabulary that n divides, and there are 257 words.

Source: FairScale 0.4.13; Shoeybi et al., "Megatron-LM", 2019.
"""

import functools
import io
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sandbox.comm import ring_bytes
from sandbox.config import Config, that_do
from sandbox.config import Options as Base
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, materialise, replace_parameters
from sandbox.row_parallel import bytes_of_sums

AXIS = "tp"
REFUSES = {"bfloat16": "its layers multiply in the dtype of their weights, and those are float32."}

COLUMNS, ROWS, NORMS = ("q", "k", "v", "gate", "up"), ("o", "down"), ("q_norm", "k_norm")


class Options(Base):
    """Options of `tensor`: none."""


def check(config: Config, options: Options) -> None:
    """Raises UnsupportedError: a width that ranks do not divide."""
    degree, model = config.mesh.tp.degree, config.model
    cut = {"model.heads": model.heads, "model.kv_heads": model.groups, "model.hidden": model.mlp_hidden}
    fit = [n for n in range(1, min(cut.values()) + 1) if not any(count % n for count in cut.values())]
    for name, count in cut.items():
        if count % degree:
            raise UnsupportedError(
                f"mesh.tp.degree {degree} does not divide {name} {count}, as FairScale needs. {that_do(fit, 'Degrees')}"
            )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` with FairScale's layers in the place of the linears of attention and MLP."""
    from fairscale.nn.model_parallel import initialize
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear

    axis, model, layout = mesh.axis("tp"), program.model, dict(program.layout)
    with redirect_stdout(io.StringIO()):  # it prints its groups
        initialize.initialize_model_parallel(axis.size)
    for name, linear in list(model.named_modules()):
        parent, _, key = name.rpartition(".")
        if not isinstance(linear, nn.Linear) or key not in (*COLUMNS, *ROWS):
            continue
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        if key in COLUMNS:
            layer = ColumnParallelLinear(*sizes, gather_output=False, init_method=torch.zero_)
        else:
            layer = RowParallelLinear(*sizes, input_is_parallel=True, init_method=torch.zero_)
        for kind, param in linear.named_parameters():
            full = f"{name}.{kind}"
            if key in COLUMNS or kind == "weight":
                dim = int(key in ROWS)
                part = param.shape[dim] // axis.size
                layout[full] = layout[full].cut(dim, axis.rank * part, (axis.rank + 1) * part, axis.names)
            setattr(layer, kind, nn.Parameter(torch.empty(layout[full].size, dtype=param.dtype, device="meta")))
        setattr(model.get_submodule(parent), key, layer)
    cut = replace(program, layout=layout)
    parameters = materialise(cut)
    for name, module in model.named_modules():
        if name.split(".")[-1] in NORMS:
            sum_gradients(module)
    return replace(cut, parameters=parameters)


def sum_gradients(norm: nn.Module) -> None:
    """Make the gradients of a norm of heads sums over tp, in backward: soon enough for who takes gradients over there.

    By what FairScale does to a linear's input: the parameter as it is, and its gradient summed.
    """
    from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region

    class Summed:
        def __getattr__(self, name: str) -> Any:
            value = getattr(norm, name)
            return copy_to_model_parallel_region(value) if isinstance(value, Tensor) else value

    norm.forward = functools.partial(type(norm).forward, Summed())


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank; cuts `model` down to what it holds."""
    axis = mesh.axis("tp")
    new, norms = {}, 0.0
    for name, param in model.named_parameters():
        *_, layer, kind = name.split(".")
        if layer in COLUMNS or (layer in ROWS and kind == "weight"):
            dim = int(layer in ROWS)
            new[name] = nn.Parameter(param.detach().narrow(dim, 0, param.shape[dim] // axis.size).clone())
        elif layer in NORMS:
            norms += ring_bytes(bytes_of([param]), axis.size)
    replace_parameters(model, new)
    sums = [
        name
        for name, module in model.named_modules()
        if name.split(".")[-1] in (*COLUMNS, *ROWS) and list(module.parameters())
    ]
    hidden = bytes_of_sums(sums, next(model.parameters()).element_size(), mesh, config)
    held = bytes_of(model.parameters())
    return Prediction(
        {f"all_reduce {axis.name}": hidden + config.train.microbatches * norms},
        {"parameters": held, "gradients": held, "optimizer": state_copies(config.train) * held},
    )
