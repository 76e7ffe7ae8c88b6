"""What the ranks of the other axes' benchmark run. In a module of its own, for ranks import it by name."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from work import take_turns

from sandbox.runtime import Member


def race(
    member: Member, racers: dict[str, dict[str, Any]], common: dict[str, Any], rounds: int
) -> dict[str, tuple[list[float], list[float], int]]:
    """By racer: each round's seconds, seconds of processor time of the rank that used most, and collectives of a step.

    A racer is the sections of a config, besides those that are `common` to all. `plain` is one process: the first
    rank's, while the others wait. `core: torch` puts torch's ring attention in the place of ours.
    """
    import torch
    import torch.distributed as dist

    from sandbox.config import Config
    from sandbox.data import Corpus
    from sandbox.mesh import Mesh
    from sandbox.model import Attention
    from sandbox.trainer import Trainer

    trainers = {}
    for name, racer in racers.items():
        sections = {key: value for key, value in racer.items() if key != "core"}
        config = Config.model_validate({**common, **sections})
        alone = config.mesh.world == 1
        mesh = Mesh(config.mesh.degrees, 0 if alone else member.rank, None if alone else member.device)
        trainers[name] = trainer = Trainer(config, mesh, torch.device(member.device), Corpus.load(config.data))
        if racer.get("core") == "torch":
            for module in trainer.program.model.modules():
                if isinstance(module, Attention):
                    module.core = torchs_ring(mesh.axis("cp"))
    used: dict[str, list[float]] = {name: [] for name in trainers}

    def step(name: str) -> None:
        start = time.process_time()
        if trainers[name].mesh.world > 1 or member.rank == 0:
            trainers[name].train_step()
        used[name].append(time.process_time() - start)

    seconds = take_turns([partial(step, name) for name in trainers], rounds)
    most = torch.tensor([each[-rounds:] for each in used.values()], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    counts = [trainer.mesh.recorder.number // max(1, trainer.step) for trainer in trainers.values()]
    return dict(zip(trainers, zip(seconds, most.tolist(), counts, strict=True), strict=True))


def torchs_ring(axis: Any) -> Any:
    """An attention core: what torch's `context_parallel` would run, had DTensor a rule for the kernel of a CPU."""
    import torch
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    op: Any = torch.ops.aten
    forward_op = op._scaled_dot_product_flash_attention_for_cpu
    backward_op = op._scaled_dot_product_flash_attention_for_cpu_backward
    cp._cp_options.enable_load_balance, cp._cp_options.convert_to_f32 = True, False

    class Ring(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *qkv: Any) -> Any:
            out, lse = cp._templated_ring_attention(axis.group, 2, forward_op, *qkv, is_causal=True, dropout_p=0.0)
            ctx.save_for_backward(*qkv, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            grads = cp._templated_ring_attention_backward(
                axis.group, 2, backward_op, grad, "grad_out", *ctx.saved_tensors, is_causal=True, dropout_p=0.0
            )
            return grads[:3]

    return lambda q, k, v, batch: Ring.apply(q, k, v)


def one_document(folder: str) -> Path:
    """The corpus as one text, for documents cut the work of attention themselves."""
    from pydoc_data.topics import topics

    file = Path(folder) / "topics.txt"
    file.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return file
