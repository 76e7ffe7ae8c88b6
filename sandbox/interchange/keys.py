"""The keys of a library's config: carried over, left out, or refused."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from sandbox.errors import ConfigError

__all__ = ["STAGES", "Keys", "Text", "leaves", "refuse_all", "strategy_of"]

AUTO = "auto"
"""What Hugging Face's Trainer fills in later: read as if the key were absent."""

STAGES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
"""Strategy -> DeepSpeed's stage."""


class Text(NamedTuple):
    """A file's text, and what its reader should know."""

    text: str
    notes: list[str]


_LEFT_OUT = (
    "steps_per_print", "wall_clock_breakdown", "dump_state", "tensorboard.*", "wandb.*", "csv_monitor.*",
    "flops_profiler.*", "comms_logger.*", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "prescale_gradients", "optimizer.params.torch_adam", "checkpoint.*", "fp16.*", "memory_breakdown",
    "zero_optimization.allgather_bucket_size", "zero_optimization.overlap_comm", "zero_optimization.reduce_scatter",
    "zero_optimization.allgather_partitions", "zero_optimization.contiguous_gradients",
    "zero_optimization.round_robin_gradients", "zero_optimization.sub_group_size", "zero_optimization.stage3_*",
    "zero_optimization.reduce_bucket_size", "zero_optimization.offload_*.pin_memory",
    "zero_optimization.memory_efficient_linear", "compute_environment", "debug", "machine_rank", "main_process_*",
    "main_training_function", "rdzv_backend", "same_network", "tpu_*", "downcast_bf16", "enable_cpu_affinity",
    "gpu_ids", "mpirun_config.*", "deepspeed_config.zero3_*", "deepspeed_config.deepspeed_*",
    "deepspeed_config.offload_*", "fsdp_config.fsdp_version", "fsdp_config.fsdp_auto_wrap_policy",
    "fsdp_config.fsdp_transformer_layer_cls_to_wrap", "fsdp_config.fsdp_min_num_params",
    "fsdp_config.fsdp_state_dict_type", "fsdp_config.fsdp_sync_module_states", "fsdp_config.fsdp_use_orig_params",
    "fsdp_config.fsdp_backward_prefetch*", "fsdp_config.fsdp_forward_prefetch",
    "fsdp_config.fsdp_cpu_ram_efficient_loading", "fsdp_config.fsdp_offload_params",
)  # fmt: skip
"""Keys that change nothing that is computed."""

_WHY = {
    "scheduler.*": "its schedules are others. Set train.schedule and train.warmup yourself",
    "fp16.*": "loss scaling is not here. Use bf16",
    "amp.*": "loss scaling is not here. Use bf16",
    "activation_checkpointing.*": "set train.recompute",
    "pipeline.*": "set mesh.pp",
    "sequence_parallel_size": "set mesh.cp: {kind: ulysses}",
    "zero_optimization.zero_hpz_partition_size": "set mesh.dp.replicas",
    "megatron_lm_config.*": "Megatron-LM is no engine here",
    "dynamo_config.*": "nothing is compiled here",
    "fp8_config.*": "there is no float8 here",
}


@dataclass
class Keys:
    """The leaves of a library's config; what nobody has taken by the end is left out or refused."""

    source: str
    found: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def take(self, key: str) -> Any:
        """The value of `key`, once; None if it is absent or left to be filled in."""
        value = self.found.pop(key, None)
        return None if value == AUTO else value

    def count(self, key: str) -> int | None:
        """A value that has to be a whole number, and is positive or zero."""
        value = self.take(key)
        if value is None:
            return None
        whole = value.is_integer() if isinstance(value, float) else type(value) is int
        if whole and value >= 0:
            return int(value)
        self.refuse(key, repr(value), "it has to be a whole number")
        return None

    def same(self, key: str, only: Any) -> None:
        """A key that may say one thing only."""
        if (value := self.take(key)) not in (None, only):
            self.refuse(key, value, f"it is {only} here")

    def refuse(self, key: str, value: Any, why: str) -> None:
        """A key that cannot be carried over."""
        self.wrong.append(f"{key} {value}: {why}")

    def lack(self, what: str) -> None:
        """Something that the file does not say."""
        self.wrong.append(f"it does not say {what}")

    def done(self) -> None:
        """Sort what is left. Raises ConfigError."""
        off = {
            key.removesuffix(".enabled") for key, value in self.found.items() if key.endswith(".enabled") and not value
        }
        left = []
        for key, value in self.found.items():
            if key.rpartition(".")[0] in off or value is False or value in (AUTO, None, []):
                continue
            if any(fnmatchcase(key, pattern) for pattern in _LEFT_OUT):
                left.append(key)
            else:
                self.refuse(
                    key, value, next((w for p, w in _WHY.items() if fnmatchcase(key, p)), "it has no counterpart")
                )
        if left:
            self.notes.append(f"left out, for they change nothing that is computed: {', '.join(left)}")
        refuse_all(self.source, "cannot be carried over", self.wrong)


def refuse_all(source: str, verb: str, wrong: list[str]) -> None:
    """Raise a ConfigError with a line for each of `wrong`, if there is any."""
    if wrong:
        raise ConfigError("\n".join(f"{source}: {verb}: {line}." for line in wrong))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is not itself a mapping."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def strategy_of(keys: Keys, stage: int) -> str:
    """The strategy that a stage of DeepSpeed is."""
    if stage not in STAGES.values():
        keys.refuse("zero_optimization.stage", stage, "there are 0 to 3")
    return next((name for name, number in STAGES.items() if number == stage), "ddp")
