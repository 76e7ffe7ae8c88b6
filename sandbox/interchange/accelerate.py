"""Accelerate's YAML. It says who runs where; optimizer, batch and steps are the program's."""

from typing import Any

import yaml

from sandbox.config import Config
from sandbox.interchange.keys import STAGES, Keys, Text, strategy_of

__all__ = ["read", "write"]


def write(config: Config, wrong: list[str]) -> Text:
    """The YAML; what it cannot say is added to `wrong`."""
    train, mesh, dp = config.train, config.mesh, config.mesh.dp
    gpu = config.run.device == "cuda"
    tree: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if gpu else "MULTI_CPU",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "bf16" if train.dtype == "bfloat16" else "no",
        "num_machines": 1,
        "num_processes": mesh.world,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": not gpu,
    }
    notes = ["left to your program: model, data, the optimizer and its schedule, train.batch, train.seed, train.steps"]
    strategy = dp.strategy if dp.degree > 1 else "ddp"
    if strategy.startswith("zero"):
        tree |= {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {
                "zero_stage": STAGES[strategy],
                "gradient_accumulation_steps": train.microbatches,
                "gradient_clipping": train.clip or 0.0,
                "offload_optimizer_device": "cpu" if dp.options.get("offload") else "none",
                "offload_param_device": "none",
                "zero3_init_flag": False,
            },
        }
        if dp.replicas > 1 or mesh.tp.degree > 1:
            wrong.append("mesh.dp.replicas and mesh.tp: with DeepSpeed, Accelerate has one axis. Use strategy fsdp")
    else:
        notes.append(
            "left to your program: train.microbatches and train.clip, arguments of Accelerator and its methods"
        )
    if strategy == "fsdp":
        tree |= {
            "distributed_type": "FSDP",
            "fsdp_config": {
                "fsdp_version": 2,
                "fsdp_reshard_after_forward": bool(dp.options.get("reshard_after_forward", True)),
                "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "fsdp_transformer_layer_cls_to_wrap": "Block",
                "fsdp_activation_checkpointing": train.recompute == "full",
                "fsdp_offload_params": False,
                "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            },
        }
    elif strategy not in STAGES:
        wrong.append(f"mesh.dp.strategy {strategy}: there are ddp, zero1, zero2, zero3 and fsdp")
    if dp.replicas > 1 or mesh.tp.degree > 1:
        if strategy == "ddp" and dp.degree > 1 and mesh.tp.degree > 1:
            dp_sizes = {"dp_replicate_size": dp.degree, "dp_shard_size": 1}
        else:
            dp_sizes = {"dp_replicate_size": dp.replicas, "dp_shard_size": dp.degree // dp.replicas}
        sizes = dp_sizes | {"tp_size": mesh.tp.degree}
        tree["parallelism_config"] = {f"parallelism_config_{name}": size for name, size in sizes.items()}
    return Text(yaml.safe_dump(tree), notes)


def read(keys: Keys, ranks: int | None) -> dict[str, Any]:
    """Our sections `mesh`, `train` and `run`."""
    kind = str(keys.take("distributed_type") or "NO").upper()
    world = keys.count("num_processes") or 1
    precision = str(keys.take("mixed_precision") or "no").lower()
    train: dict[str, Any] = {"dtype": "bfloat16" if precision == "bf16" else "float32"}
    if precision not in ("no", "bf16"):
        keys.refuse("mixed_precision", precision, "there are no and bf16")
    if (machines := keys.count("num_machines") or 1) > 1:
        keys.notes.append(f"num_machines {machines}: torchrun says how ranks lie on machines")
    sizes = {name: keys.count(f"parallelism_config.parallelism_config_{name}_size") or 1 for name in _AXES}
    dp: dict[str, Any] = {"degree": ranks or world // sizes["tp"], "strategy": "ddp"}
    if kind == "FSDP":
        dp |= _fsdp(keys, sizes)
        if keys.take("fsdp_config.fsdp_activation_checkpointing"):
            train["recompute"] = "full"
        if dp["strategy"] == "fsdp" and sizes["dp_replicate"] > 1:
            dp["replicas"] = sizes["dp_replicate"]
    elif kind == "DEEPSPEED":
        dp |= _deepspeed(keys, train)
    elif kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        keys.refuse("distributed_type", kind, "there are NO, MULTI_CPU, MULTI_GPU, FSDP and DEEPSPEED")
    mesh: dict[str, Any] = {"dp": dp}
    if sizes["tp"] > 1:
        mesh["tp"] = {"degree": sizes["tp"]}
    for name in ("cp", "sp"):
        if sizes[name] > 1:
            keys.refuse(f"parallelism_config.parallelism_config_{name}_size", sizes[name], "say mesh.cp yourself")
    train["batch"] = max(16, dp["degree"] * train.get("microbatches", 1))
    keys.notes.append("not in the file, so ours by default: model, data, and most of train")
    run = {"device": "cpu"} if keys.take("use_cpu") or kind == "MULTI_CPU" else {}
    return {"mesh": mesh, "train": train, "run": run}


_AXES = ("dp_replicate", "dp_shard", "tp", "cp", "sp")


def _deepspeed(keys: Keys, train: dict[str, Any]) -> dict[str, Any]:
    """Its DeepSpeed plugin, in so far as the file itself says it."""
    dp: dict[str, Any] = {}
    stage = keys.count("deepspeed_config.zero_stage")
    dp["strategy"] = strategy_of(keys, 2 if stage is None else stage)  # 2 is Accelerate's default
    train["microbatches"] = keys.count("deepspeed_config.gradient_accumulation_steps") or 1
    train["clip"] = keys.take("deepspeed_config.gradient_clipping") or None
    if keys.take("deepspeed_config.offload_optimizer_device") == "cpu":
        dp["offload"] = True
    if (device := keys.take("deepspeed_config.offload_param_device")) not in (None, "none"):
        keys.refuse("deepspeed_config.offload_param_device", device, "parameters stay where they compute")
    if (file := keys.take("deepspeed_config.deepspeed_config_file")) is not None:
        keys.refuse("deepspeed_config.deepspeed_config_file", file, "import that file itself")
    return dp


def _fsdp(keys: Keys, sizes: dict[str, int]) -> dict[str, Any]:
    """FSDP1 says by a sharding strategy what FSDP2 says by `reshard_after_forward`."""
    how = keys.take("fsdp_config.fsdp_sharding_strategy")
    again = keys.take("fsdp_config.fsdp_reshard_after_forward")
    again = again if isinstance(again, str) else None if again is None else ("FULL_SHARD" if again else "SHARD_GRAD_OP")
    names = {1: "FULL_SHARD", 2: "SHARD_GRAD_OP", 3: "NO_SHARD"}
    kind = str(names.get(how, how) or again or "FULL_SHARD").upper()
    if keys.take("fsdp_config.fsdp_offload_params"):
        keys.refuse("fsdp_config.fsdp_offload_params", True, "parameters stay where they compute")
    known: dict[str, dict[str, Any]] = {
        "FULL_SHARD": {"strategy": "fsdp"},
        "TRUE": {"strategy": "fsdp"},
        "SHARD_GRAD_OP": {"strategy": "fsdp", "reshard_after_forward": False},
        "FALSE": {"strategy": "fsdp", "reshard_after_forward": False},
        "NO_SHARD": {"strategy": "ddp"},
    }
    if kind not in known:
        keys.refuse("fsdp_config.fsdp_sharding_strategy", kind, "say fsdp_version: 2 and dp_replicate_size")
    return known.get(kind, {})
