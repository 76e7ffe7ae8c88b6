"""Engine `deepspeed`: DeepSpeed's own engine, optimizer and accumulation, in the slots of `sandbox.program`."""

from sandbox.engines.deepspeed._cpu_adam import compiled as compiled

REQUIRES = ("deepspeed",)
"""Packages that have to be installed, of the extra `engines`."""

PRELOAD = (
    "sandbox.engines.deepspeed._quiet",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.muon.original_muon",  # which compiles, and so imports torch._inductor
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
)

UNSUPPORTED = {
    "expert": "its MoE layer balances the load by means over one rank's microbatch, padding included, so that its loss "
    "depends on how rows are cut, and no unsharded run has the same. Use engine native.",
    "fsdp": "DeepSpeed cuts parameters in ranges, not by rows. Use strategy zero3.",
}
"""Strategies of ours that DeepSpeed does not have, or not here, each with the reason."""
