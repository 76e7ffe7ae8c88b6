"""Ring attention by torch, and a text for it. In a module of its own, for ranks import it by name."""

from pathlib import Path
from typing import Any


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
