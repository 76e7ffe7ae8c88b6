"""How each module of a transformer is cut over tp, in the terms of torch's `parallelize_module`."""

from typing import Any

from torch import nn

from sandbox.model import Block, MoE, Transformer

__all__ = ["between", "styles"]


def styles(model: Transformer, *, sequence: bool) -> dict[str, Any]:
    """Module -> how it is cut, for `parallelize_module`. What is not named is replicated."""
    from torch.distributed.tensor import Partial, Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    outside, whole = between(sequence=sequence), Replicate()

    def enter(*others: None) -> PrepareModuleInput:
        return PrepareModuleInput(input_layouts=(outside, *others), desired_input_layouts=(whole, *others))

    def linears(mlp: nn.Module, at: str, down: RowwiseParallel) -> dict[str, Any]:
        # to `down` as DTensors: a local part does not tell the whole
        return {
            f"{at}.{name}": down if name == "down" else ColwiseParallel(use_local_output=False)
            for name, _ in mlp.named_children()
        }

    plan: dict[str, Any] = {}
    if model.embed is not None:
        plan["embed"] = RowwiseParallel(input_layouts=whole, output_layouts=outside)
    for key, block in model.blocks.items():
        assert isinstance(block, Block)
        at = f"blocks.{key}"
        plan |= {f"{at}.attention": enter(None), f"{at}.attention.o": RowwiseParallel(output_layouts=outside)}
        plan |= {f"{at}.attention.{name}": ColwiseParallel() for name in ("q", "k", "v")}
        if isinstance(block.mlp, MoE):
            term = RowwiseParallel(output_layouts=Partial(), use_local_output=False)
            for number, expert in block.mlp.experts.items():
                plan |= linears(expert, f"{at}.mlp.experts.{number}", term)
        else:
            plan |= {f"{at}.mlp": enter(), **linears(block.mlp, f"{at}.mlp", RowwiseParallel(output_layouts=outside))}
        for name in ("q_norm", "k_norm"):
            if list(getattr(block.attention, name).parameters()):  # a sequence of heads
                plan[f"{at}.attention.{name}"] = SequenceParallel(sequence_dim=1, use_local_output=True)
        if sequence:
            plan |= {f"{at}.{name}": SequenceParallel(use_local_output=True) for name in ("norm1", "norm2")}
    if model.head is not None:
        plan["head"] = ColwiseParallel(input_layouts=outside, use_local_output=False)
        if sequence:
            plan["norm"] = SequenceParallel(use_local_output=True)
    return plan


def between(*, sequence: bool) -> Any:
    """How the hidden state lies outside attention, MLP and head."""
    from torch.distributed.tensor import Replicate, Shard

    return Shard(1) if sequence else Replicate()
