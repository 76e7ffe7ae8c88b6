"""A DeepSpeed engine in the processes that are there already, and its step in the shape of the trainer's.

DeepSpeed clips and steps at once, so the norm is known only after the step: `clip` returns a tensor that the step
fills. It divides each loss by the number of microbatches and averages gradients over the ranks; our loss is already a
share of the global sum, so it is scaled by both.
"""

import io
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sandbox.batch import Batch
from sandbox.config import Config
from sandbox.engines.deepspeed._pieces import ByPiece, bring_up_to_date, flat_tensors
from sandbox.mesh import Mesh
from sandbox.program import Program, shard_rows, training_loss, unless_stepped

__all__ = ["REFUSES", "EngineOptimizer", "drive", "initialize", "prepare", "settings"]

REFUSES = {"float64": "its optimizer keeps its own copy of parameters and gradients in float32."}
"""dtype -> why the engine has none of it."""


def initialize(program: Program, optimizer: torch.optim.Optimizer, zero: Mapping[str, Any], **others: Any) -> Any:
    """`deepspeed.initialize` around the program's model and `optimizer`.

    `zero` is the section `zero_optimization` of its config, `others` are settings beside it.
    """
    prepare()
    import deepspeed

    with redirect_stdout(io.StringIO()):  # it prints its memory
        engine, *_ = deepspeed.initialize(
            model=program.model,
            optimizer=optimizer,
            dist_init_required=False,
            config=settings(program.config, zero) | others,
        )
    return engine


def prepare() -> None:
    """Import DeepSpeed in this rank, quiet, and without the operators that it would compile."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}  # read by DeepSpeed
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    from sandbox.engines.deepspeed._quiet import deepspeed

    # Of its compiled operators only CPU Adam is used, and built ahead: to ask which are possible runs compilers on
    # every rank, and the one for all-reduces over shared memory would be built, for a minute, as its backend starts
    deepspeed.ops.__compatible_ops__ = {}
    warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)  # deprecated, and used by DeepSpeed


def settings(config: Config, zero: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own config for the training; `zero` is its section `zero_optimization`."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # of its own accounting only
        "gradient_accumulation_steps": config.train.microbatches,
        "gradient_clipping": config.train.clip or 0.0,
        "bf16": {"enabled": config.train.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # of SGD it has none of its own
        "zero_optimization": dict(zero),
    }


def drive(
    program: Program,
    engine: Any,
    inner: torch.optim.Optimizer,
    mesh: Mesh,
    collect: Callable[[], None],
    backward: Callable[[Tensor, bool], None] | None = None,
) -> Program:
    """Return `program` run by the `engine`, whose optimizer of parameters is `inner`.

    After the last microbatch, `collect` hands the engine's gradients to the program's parameters. `backward` takes a
    microbatch's loss, and whether it is the last one.
    """

    def own_backward(loss: Tensor, final: bool) -> None:
        engine.backward(loss)
        if not final:
            engine.step()  # only counts

    backward = backward or own_backward
    ranks = mesh.axis("dp_replicate", "dp_shard", "cp").size
    optimizer = EngineOptimizer(engine, inner, program.parameters)

    def forward_backward(finished: Program, microbatches: list[Batch], valid: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=microbatches[0].tokens.device)
        for number, batch in enumerate(microbatches, 1):
            program.begin(number == len(microbatches))
            loss = training_loss(finished, batch) / valid
            backward(loss * ranks * len(microbatches), number == len(microbatches))
            finished.reduce_grads()
            total += loss.detach()
        collect()
        return total

    restored = unless_stepped(inner, lambda: bring_up_to_date(engine, inner))

    def refresh() -> None:
        program.refresh()
        restored()
        for piece in program.parameters.values():
            piece.grad = None  # the engine has let go of it too

    return replace(
        program,
        model=engine,
        shard_batch=shard_rows(program, mesh),
        forward_backward=forward_backward,
        make_optimizer=lambda finished: cast(torch.optim.Optimizer, optimizer),
        refresh=refresh,
        clip=optimizer.clip,
    )


class EngineOptimizer:
    """The engine's step as an optimizer's: rates and state are those of the one inside it.

    `parameters`: those of the program.
    """

    def __init__(self, engine: Any, inner: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
        self.engine, self.optim, self._step = engine, inner, engine.step
        self.register_step_pre_hook = inner.register_step_pre_hook
        self.register_step_post_hook = inner.register_step_post_hook
        self.norm = torch.zeros((), dtype=torch.float64)
        self._parameters = parameters

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, with the rate that the next step uses."""
        return self.optim.param_groups

    @property
    def state(self) -> Mapping[Tensor, Any]:
        """What is kept for each partition."""
        return self.optim.state

    @property
    def by_parameter(self) -> torch.optim.Optimizer | ByPiece:
        """Groups and state by the program's parameters, which with ZeRO are pieces of the partitions."""
        flats = flat_tensors(self.engine)
        return ByPiece(self.optim, flats, self._parameters.values()) if flats else self.optim

    def clip(self, program: Program, most: float | None) -> Tensor:
        """The slot `clip`: the norm, once the step has been taken."""
        self.norm = torch.zeros((), dtype=torch.float64)
        return self.norm

    def step(self) -> None:
        """Clip, step, and bring the model up to date."""
        self._step()
        norm = self.engine.get_global_grad_norm()
        if norm is not None:  # without ZeRO there is none
            self.norm.fill_(float(norm))
