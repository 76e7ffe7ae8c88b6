"""Engine `torch`: what torch.distributed itself brings, in the slots of `sandbox.program`."""

UNSUPPORTED = {
    "zero2": "torch.distributed.optim shards the optimizer only. Nearest: strategy fsdp, reshard_after_forward: false.",
    "zero3": "torch.distributed has it as FSDP, cut by rows. Use strategy fsdp.",
}
"""Strategies of ours that torch does not have under that name, each with the nearest."""
