"""DeepSpeed's JSON. It says how to step, not on what: no model, no data, and not how many ranks there are."""

import json
from typing import Any

from sandbox.config import Config
from sandbox.interchange.keys import STAGES, Keys, Text, strategy_of

__all__ = ["read", "write"]

MIB = 2**20
OPTIMIZERS = {"adamw": "AdamW", "sgd_momentum": "SGD", "sgd": "SGD"}


def write(config: Config, wrong: list[str]) -> Text:
    """The JSON; what it cannot say is added to `wrong`."""
    train, dp = config.train, config.mesh.dp
    if dp.strategy not in STAGES and dp.degree > 1:
        wrong.append(f"mesh.dp.strategy {dp.strategy}: nearest zero3, --set mesh.dp.strategy=zero3")
    if dp.replicas > 1:
        wrong.append(f"mesh.dp.replicas {dp.replicas}: it shards over all data ranks. --set mesh.dp.replicas=1")
    if train.batch % (dp.degree * train.microbatches):
        wrong.append(
            f"train.batch {train.batch}: its microbatches have one size, so mesh.dp.degree {dp.degree} x "
            f"train.microbatches {train.microbatches} has to divide it"
        )
    stage = STAGES.get(dp.strategy, 0) if dp.degree > 1 else 0
    zero: dict[str, Any] = {"stage": stage}
    if "bucket_mb" in dp.options and stage:
        size = round(dp.options["bucket_mb"] * MIB / (2 if train.dtype == "bfloat16" else 4))
        zero |= {"reduce_bucket_size": size, "allgather_bucket_size": size}
    if dp.options.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    params: dict[str, Any] = {"lr": train.lr, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        params["betas"] = list(train.betas)
    elif train.optimizer == "sgd_momentum":
        params["momentum"] = train.momentum
    tree = {
        "train_batch_size": train.batch,
        "train_micro_batch_size_per_gpu": train.batch // (dp.degree * train.microbatches),
        "gradient_accumulation_steps": train.microbatches,
        "gradient_clipping": train.clip or 0.0,
        "optimizer": {"type": OPTIMIZERS[train.optimizer], "params": params},
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "zero_optimization": zero,
    }
    if train.dtype == "bfloat16":
        tree["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.mesh.tp.degree > 1:
        tree["tensor_parallel"] = {"autotp_size": config.mesh.tp.degree}
    notes = ["left to your program: model, data, train.seed, train.steps"]
    if train.schedule != "constant" or train.warmup:
        notes.append("left to your program: train.schedule and train.warmup, for DeepSpeed's schedules are others")
    if train.weight_decay:
        notes.append("train.weight_decay spares vectors here: give DeepSpeed parameter groups that say so")
    if train.recompute != "none":
        notes.append("left to your program: train.recompute, with deepspeed.checkpointing.checkpoint")
    return Text(json.dumps(tree, indent=2) + "\n", notes)


def read(keys: Keys, ranks: int | None) -> dict[str, Any]:
    """Our sections `mesh` and `train`."""
    train: dict[str, Any] = {}
    whole, micro = keys.count("train_batch_size"), keys.count("train_micro_batch_size_per_gpu")
    passes = keys.count("gradient_accumulation_steps") or 1
    if ranks is None and whole and micro:
        ranks = max(1, whole // (micro * passes))
    if ranks is None:
        keys.lack("how many data ranks there are. Say --ranks N, or give all three sizes of a batch")
    batch = whole or (micro or 1) * passes * (ranks or 1)
    if micro and ranks and batch != micro * passes * ranks:
        keys.wrong.append(
            f"train_batch_size {batch}: is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{passes} x {ranks} ranks"
        )
    train |= {"batch": batch, "microbatches": passes, "clip": keys.take("gradient_clipping") or None}
    train |= _optimizer(keys)
    train["dtype"] = "bfloat16" if keys.take("bf16.enabled") or keys.take("bfloat16.enabled") else "float32"
    item = 2 if train["dtype"] == "bfloat16" else 4
    if keys.take("fp16.enabled"):
        keys.refuse("fp16.enabled", True, "loss scaling is not here. Use bf16")
    keys.same("data_types.grad_accum_dtype", "fp32")
    stage = keys.count("zero_optimization.stage") or 0
    dp: dict[str, Any] = {"degree": ranks or 1, "strategy": strategy_of(keys, stage)}
    if stage in (1, 2) and (size := keys.count("zero_optimization.reduce_bucket_size")):
        dp["bucket_mb"] = size * item / MIB
    if (device := keys.take("zero_optimization.offload_optimizer.device")) not in (None, "none"):
        dp["offload"] = True
        if device != "cpu":
            keys.refuse("zero_optimization.offload_optimizer.device", device, "only cpu")
    if (device := keys.take("zero_optimization.offload_param.device")) not in (None, "none"):
        keys.refuse("zero_optimization.offload_param.device", device, "parameters stay where they compute")
    mesh: dict[str, Any] = {"dp": dp}
    if (degree := keys.count("tensor_parallel.autotp_size") or 1) > 1:
        mesh["tp"] = {"degree": degree}
    return {"mesh": mesh, "train": train}


def _optimizer(keys: Keys) -> dict[str, Any]:
    if (kind := keys.take("optimizer.type")) is None:
        keys.notes.append("the file names no optimizer, so it is ours by default")
        return {}
    kind = str(kind)
    train: dict[str, Any] = {}
    for theirs, ours in (("lr", "lr"), ("weight_decay", "weight_decay")):
        if (value := keys.take(f"optimizer.params.{theirs}")) is not None:
            train[ours] = value
    adam, momentum = kind.lower() in ("adam", "adamw"), keys.take("optimizer.params.momentum")
    train["optimizer"] = "adamw" if adam else "sgd_momentum" if momentum else "sgd"
    if adam:
        train["betas"] = keys.take("optimizer.params.betas") or [0.9, 0.999]
        keys.same("optimizer.params.eps", 1e-8)
        keys.same("optimizer.params.adam_w_mode", True)
        keys.same("optimizer.params.bias_correction", True)
        if kind.lower() == "adam" and train.get("weight_decay"):
            keys.notes.append("optimizer.type Adam: decays as AdamW, which is what DeepSpeed's Adam does by default")
    elif kind.lower() == "sgd":
        train |= {"momentum": momentum} if momentum else {}
    else:
        keys.refuse("optimizer.type", kind, "there are Adam, AdamW and SGD")
    if train.get("weight_decay"):
        keys.notes.append("optimizer.params.weight_decay: here vectors are spared, as in most recipes")
    return train
