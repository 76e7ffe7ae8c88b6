"""Engine `accelerate`: Hugging Face's Accelerate, `Accelerator.prepare` and all, in the slots of `sandbox.program`."""

REQUIRES = ("accelerate", "deepspeed", "transformers")
"""Packages that have to be installed, of the extra `engines`."""

PRELOAD = (
    "accelerate",
    "sandbox.engines.deepspeed._quiet",  # which Accelerate imports wherever it is installed
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "transformers.integrations.tensor_parallel",
)

UNSUPPORTED = {
    "context": "Accelerate's is torch's context_parallel, which has no rule for attention on CPU. Use engine native.",
    "expert": "Accelerate deals out no experts itself: it has no axis for them. Use engine native.",
    "pipeline": "Accelerate has pipelines for inference only. Use engine native.",
}
"""Strategies of ours that Accelerate does not have, or not here, each with the reason."""
