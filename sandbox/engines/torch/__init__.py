"""Engine `torch`: what torch.distributed itself brings, in the slots of `sandbox.program`."""

UNSUPPORTED = {
    "context": "on a CPU torch's context_parallel raises NotImplementedError: DTensor has no sharding rule for the "
    "attention kernel there, _scaled_dot_product_flash_attention_for_cpu. Nearest: engine native.",
    "expert": "torch.distributed has no layer that deals experts out, nor sends tokens to them. Use engine native.",
    "zero2": "torch.distributed.optim shards the optimizer only. Nearest: strategy fsdp, reshard_after_forward: false.",
    "zero3": "torch.distributed has it as FSDP, cut by rows. Use strategy fsdp.",
}
"""Strategies of ours that torch does not have under that name, each with the nearest."""
