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

Source: DeepSpeed 0.19.8; Shoeybi et al., "Megatron-LM", 2019.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from sandbox.comm import ring_bytes
from sandbox.config import Config
from sandbox.config import Options as Base
from sandbox.engines.deepspeed import _engine, ddp
from sandbox.errors import UnsupportedError
from sandbox.mesh import Mesh
from sandbox.partition import even
from sandbox.predict import Prediction, bytes_of, state_copies
from sandbox.program import Program, materialise, replace_parameters
from sandbox.row_parallel import bytes_of_sums

AXIS = "tp"
REFUSES = ddp.REFUSES

COLUMNS, ROWS, NORMS = ("q", "k", "v", "gate", "up"), ("o", "down"), ("q_norm", "k_norm")


class Options(Base):
    """Options of `tensor`: none."""


def check(config: Config, options: Options) -> None:
    """Raises UnsupportedError: more ranks than key/value heads, or another axis."""
    degree, model = config.mesh.tp.degree, config.model
    for name, count in (("model.kv_heads", model.groups), ("model.hidden", model.mlp_hidden)):
        if count < degree:
            raise UnsupportedError(f"mesh.tp.degree {degree} is more than {name} {count}: a rank would hold none.")
    if config.mesh.world != degree:
        raise UnsupportedError(
            "mesh: DeepSpeed has one engine for all axes, and here each strategy starts its own. "
            "Leave mesh.tp alone on the mesh."
        )


def apply(program: Program, mesh: Mesh, options: Options) -> Program:
    """Return `program` run by a DeepSpeed engine of stage 0, whose linears are AutoTP's."""
    axis, model, layout = mesh.axis(AXIS), program.model, dict(program.layout)
    parameters = materialise(program)
    inner = program.make_optimizer(replace(program, parameters=parameters))
    model.config = SimpleNamespace(num_key_value_heads=program.config.model.groups)  # type: ignore[assignment]
    tensor_parallel = {"autotp_size": axis.size, "partition_config": partition()}
    engine = _engine.initialize(program, inner, {"stage": 0}, tensor_parallel=tensor_parallel)
    engine.first_dataloader_check.remove()  # compares inputs over ranks, and knows tensors only
    for name, param in parameters.items():
        dim = int(cut_in(name) == "row")
        if cut_in(name):
            sizes = cuts(layout[name].shape[dim], name, program.config, axis.size)
            start = sum(sizes[: axis.rank])
            layout[name] = layout[name].cut(dim, start, start + sizes[axis.rank], axis.names)
        assert param.shape == layout[name].size, f"AutoTP cuts {name} otherwise: {tuple(param.shape)}"
    cut = replace(program, parameters=parameters, layout=layout)
    driven = _engine.drive(cut, engine, inner, mesh, lambda: None)

    def clip(finished: Program, most: float | None) -> Tensor:
        return program.clip(finished, None)  # the engine clips, and tells no norm

    return replace(driven, clip=clip)


def partition() -> dict[str, Any]:
    """What is cut and how, as DeepSpeed reads it."""

    def ending(names: tuple[str, ...], kinds: str) -> list[str]:
        return [rf".*\.({'|'.join(names)})\.({kinds})$"]

    return {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": ending(COLUMNS, "weight"), "partition_type": "column"},
            {"patterns": ending(ROWS, "weight"), "partition_type": "row"},
            {"patterns": ending(NORMS, "weight|bias"), "partition_type": "skip", "grad_allreduce": True},
        ],
    }


def cut_in(name: str) -> str:
    """How a parameter is cut: "column", "row", or not, ""."""
    *_, layer, kind = name.split(".")
    return "column" if layer in COLUMNS else "row" if layer in ROWS and kind == "weight" else ""


def cuts(size: int, name: str, config: Config, ranks: int) -> list[int]:
    """Rows or columns of each rank: of attention whole key/value heads, of the MLP as even as can be."""
    if "mlp" in name:
        return even(size, ranks)
    groups = config.model.groups
    return [size // groups * held for held in even(groups, ranks)]


def predict(model: nn.Module, mesh: Mesh, options: Options, config: Config) -> Prediction:
    """Bytes sent in one step and held after it, by this rank; cuts `model` down to what it holds."""
    axis = mesh.axis(AXIS)
    new, norms = {}, 0.0
    for name, param in model.named_parameters():
        if how := cut_in(name):
            dim = int(how == "row")
            sizes = cuts(param.shape[dim], name, config, axis.size)
            start = sum(sizes[: axis.rank])
            new[name] = nn.Parameter(param.detach().narrow(dim, start, sizes[axis.rank]).clone())
        elif name.split(".")[-2] in NORMS:
            norms += ring_bytes(bytes_of([param]), axis.size)
    sums = sum(name.endswith(".weight") and bool(cut_in(name)) for name, _ in model.named_parameters())
    replace_parameters(model, new)
    hidden = bytes_of_sums(sums, next(model.parameters()).element_size(), axis, config)
    held = bytes_of(model.parameters())
    return Prediction(
        {f"all_reduce {axis.name}": hidden + config.train.microbatches * norms},
        {"parameters": held, "gradients": 0, "optimizer": state_copies(config.train) * held},
    )
