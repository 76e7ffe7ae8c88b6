"""Engine `fairscale`: FairScale's own implementations, in the slots of `sandbox.program`."""

REQUIRES = ("fairscale",)
"""Packages that have to be installed, of the extra `engines`."""

PRELOAD = ("fairscale.nn", "fairscale.optim")

UNSUPPORTED = {
    "context": "FairScale has no context parallelism. Use engine native or deepspeed.",
    "expert": "FairScale's gate drops tokens beyond 2 / E of them an expert, and draws the second expert by chance, so "
    "no unsharded run is the same. Use engine native.",
    "pipeline": "FairScale's Pipe runs all stages in one process, on several devices. Use engine native or deepspeed.",
    "zero3": "FairScale has it as FSDP. Use strategy fsdp.",
    "ddp": "FairScale has none of its own: its OSS is used together with torch's. Use engine torch, or strategy zero1.",
}
"""Strategies of ours that FairScale does not have, or not here, each with the reason."""
