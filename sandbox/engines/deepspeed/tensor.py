"""DeepSpeed's AutoTP by `partition_config`: linears of attention and MLP cut over tp, two sums a block in forward.

    tensor                       before         in use
    q, k, v, gate, up W, b       W[F_tp, D]     "column": own heads or features, of a whole input
    o, down           W          W[D, F_tp]     "row": from own heads or features, a term of the sum
    o, down           b          b[D]           added once, after the sum
    q_norm, k_norm    w, b       w[E]           on its own heads: gradient {U_tp}, summed after every microbatch
    embedding, norms, head                      whole, and computed by every rank alike

`W[F_tp, D]` reads: F is cut over axis tp, sizes differ by one at most; attention is cut by key/value heads, each with
its queries. `{U_tp}`: not yet summed over tp.

Bytes sent by a rank for each microbatch: n ranks, X bytes of hidden state [B, S, D], to all_reduce 2 (n-1)/n X twice a
block in forward, and in backward once for each of q, k, v, up and gate, where one sum for all layers of one input would
do; and 2 (n-1)/n w for w bytes of q_norm and k_norm, where once a step would do. Memory: optimizer state and parameters
of the cut linears by n, of all else in full. Gradients are let go with the step.

By itself it is an engine of stage 0. Beside dp it is that of the data strategy, whose ZeRO of any stage cuts, and sums
over the other ranks, what AutoTP has left to a rank (_autotp.py). Beside Ulysses a rank exchanges the heads it has.

Source: DeepSpeed 0.19.8; Shoeybi et al., "Megatron-LM", 2019.
"""

from torch import nn

from sandbox.comm import ring_bytes
from sandbox.config import Config, that_do
from sandbox.config import Options as Base
from sandbox.engines.deepspeed import _engine, ddp
from sandbox.engines.deepspeed._autotp import NORMS, cut_in, cuts
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, replace_parameters
from sandbox.row_parallel import bytes_of_sums

AXIS = "tp"
REFUSES = _engine.REFUSES
ROUNDS = True

DATA = ("dp_replicate", "dp_shard", "cp")
"""Axes that a data strategy acts on."""


class Options(Base):
    """Options of `tensor`: none."""


def check(config: Config, options: Options) -> None:
    """Raises UnsupportedError: more ranks than key/value heads, or another axis."""
    degree, model = config.mesh.tp.degree, config.model
    name, most = min(("model.kv_heads", model.groups), ("model.hidden", model.mlp_hidden), key=lambda item: item[1])
    if degree > most:
        raise UnsupportedError(
            f"mesh.tp.degree {degree} is more than {name} {most}: a rank would hold none. "
            f"{that_do(range(1, most + 1), 'Degrees')}"
        )
    if config.mesh.pp.degree > 1:
        raise UnsupportedError(
            "mesh.pp: DeepSpeed's AutoTP takes all ranks that are not along tp for data ranks, stages too. "
            "Set mesh.pp.degree: 1."
        )
    if config.train.dtype == "bfloat16" and config.mesh.dp.degree == 1:
        raise UnsupportedError(f"train.dtype: engine deepspeed without ZeRO: {ddp.REFUSES['bfloat16']}")


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` run by a DeepSpeed engine of stage 0, unless a data strategy starts one with its own stage."""
    return program if mesh.axis(*DATA).size > 1 else ddp.apply(program, mesh, ddp.Options())


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank; cuts `model` down to what it holds."""
    axis = mesh.axis(AXIS)
    item = 2 if config.train.dtype == "bfloat16" else 4
    new, norms = {}, 0.0
    for name, param in model.named_parameters():
        if how := cut_in(name):
            dim = int(how == "row")
            sizes = cuts(param.shape[dim], name, config, axis.size)
            start = sum(sizes[: axis.rank])
            new[name] = nn.Parameter(param.detach().narrow(dim, start, sizes[axis.rank]).clone())
        elif name.split(".")[-2] in NORMS:
            norms += ring_bytes(param.numel() * item, axis.size)
    sums = [name for name, _ in model.named_parameters() if name.endswith(".weight") and cut_in(name)]
    replace_parameters(model, new)
    hidden = bytes_of_sums(sums, item, mesh, config)
    held = bytes_of(model.parameters())
    return Prediction(
        {f"all_reduce {axis.name}": hidden + config.train.microbatches * norms},
        {"parameters": held, "gradients": 0, "optimizer": state_copies(config.train) * held},
    )
