"""Configs go to other libraries and come back the same; what cannot be carried over is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.config import Config, load
from sandbox.errors import ConfigError
from sandbox.interchange import export, read
from sandbox.plan import plan

pytestmark = pytest.mark.unit

CONFIGS = Path(__file__).parents[1] / "configs"


def config(strategy: str = "zero2", degree: int = 4, **sections: dict[str, Any]) -> Config:
    dp = {"degree": degree, "strategy": strategy} | sections.pop("dp", {})
    mesh = {"dp": dp} | sections.pop("mesh", {})
    return Config.model_validate({"name": "c", "mesh": mesh} | sections)


def there_and_back(ours: Config, target: str, folder: Path, **how: Any) -> Config:
    file = folder / ("c.json" if target == "deepspeed-json" else "c.yaml")
    file.write_text(export(ours, target, Path("c.yaml")).text, encoding="utf-8")
    return read(file, **how)[0]


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize(
    "train",
    [
        {"batch": 24, "microbatches": 3, "dtype": "bfloat16", "betas": [0.8, 0.99], "weight_decay": 0.0},
        {"batch": 8, "optimizer": "sgd_momentum", "momentum": 0.7, "clip": None, "lr": 0.5},
        {"batch": 8, "optimizer": "sgd", "clip": 0.25},
    ],
)
def test_deepspeeds_json_comes_back_the_same(strategy: str, train: dict[str, Any], tmp_path: Path) -> None:
    ours = config(strategy, train=train, dp={"bucket_mb": 1.5} if strategy in ("zero1", "zero2") else {})
    back = there_and_back(ours, "deepspeed-json", tmp_path)
    assert back.mesh == ours.mesh
    assert back.train == ours.train
    assert plan(back)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("ddp", {}),
        ("zero1", {"train": {"microbatches": 3, "clip": 0.5}}),
        ("zero2", {"train": {"clip": None, "dtype": "bfloat16"}}),
        ("zero3", {}),
        ("fsdp", {"train": {"recompute": "full"}}),
        ("fsdp", {"dp": {"reshard_after_forward": False}, "run": {"device": "cpu"}}),
        ("fsdp", {"dp": {"replicas": 2}}),
        ("fsdp", {"mesh": {"tp": {"degree": 2}}, "dp": {"replicas": 2}}),
        ("ddp", {"mesh": {"tp": {"degree": 2}}}),
    ],
)
def test_accelerates_yaml_comes_back_the_same(strategy: str, changes: dict[str, Any], tmp_path: Path) -> None:
    ours = config(strategy, **changes)
    back = there_and_back(ours, "accelerate-yaml", tmp_path)
    assert back.mesh == ours.mesh
    kept = {"dtype", "recompute"} | ({"microbatches", "clip"} if strategy.startswith("zero") else set())
    assert back.train.model_dump(include=kept) == ours.train.model_dump(include=kept)
    assert plan(back)


def test_offload_comes_back_for_the_library_itself(tmp_path: Path) -> None:
    ours = config(dp={"offload": True}, engine="deepspeed")
    for target in ("deepspeed-json", "accelerate-yaml"):
        assert there_and_back(ours, target, tmp_path, engine="deepspeed").mesh == ours.mesh
        with pytest.raises(ConfigError, match="--engine deepspeed"):
            there_and_back(ours, target, tmp_path)


def test_every_config_goes_to_torchrun_and_the_rest_says_why_not() -> None:
    for path in CONFIGS.glob("*.yaml"):
        ours = load(path)
        assert f"--nproc-per-node {ours.mesh.world} " in export(ours, "torchrun", path).text
        for target in ("deepspeed-json", "accelerate-yaml"):
            try:
                text, notes = export(ours, target, path)
            except ConfigError as error:
                assert all(f"cannot be said in {target}: mesh." in line for line in str(error).splitlines())
            else:
                assert yaml.safe_load(text)
                assert notes


@pytest.mark.parametrize("file", sorted(CONFIGS.parent.glob("launch/accelerate/*.yaml")), ids=lambda file: file.stem)
def test_a_file_for_accelerate_launch_is_what_is_written_for_its_config(file: Path) -> None:
    ours = CONFIGS / "engines" / f"accelerate_{file.stem}.yaml"
    assert file.read_text().endswith(export(load(ours, ["run.device=cpu"]), "accelerate-yaml", ours).text)


# As in the libraries' own examples and documentation

TRAINER = """{
  "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
  "bf16": {"enabled": true},
  "optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": "auto"}},
  "zero_optimization": {
    "stage": 2, "offload_optimizer": {"device": "none", "pin_memory": true}, "allgather_partitions": true,
    "allgather_bucket_size": 2e8, "overlap_comm": true, "reduce_scatter": true, "reduce_bucket_size": 2e8,
    "contiguous_gradients": true
  },
  "gradient_accumulation_steps": 2, "gradient_clipping": 1.0, "steps_per_print": 2000,
  "train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "wall_clock_breakdown": false
}"""
CIFAR = """{
  "train_batch_size": 16, "steps_per_print": 2000,
  "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
  "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000}},
  "gradient_clipping": 1.0, "prescale_gradients": false, "bf16": {"enabled": false},
  "fp16": {"enabled": true, "fp16_master_weights_and_grads": false, "loss_scale": 0, "initial_scale_power": 15},
  "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}, "stage3_max_live_parameters": 1e9}
}"""
FSDP2 = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
enable_cpu_affinity: false
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_version: 2
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 8
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
FSDP1 = FSDP2.replace("fsdp_reshard_after_forward: true", "fsdp_sharding_strategy: SHARD_GRAD_OP").replace(
    "fsdp_version: 2", "fsdp_backward_prefetch: BACKWARD_PRE"
)


def write(folder: Path, text: str) -> Path:
    file = folder / ("x.json" if text.lstrip().startswith("{") else "x.yaml")
    file.write_text(text, encoding="utf-8")
    return file


def test_a_trainers_json_is_read(tmp_path: Path) -> None:
    found, notes = read(write(tmp_path, TRAINER))
    assert str(found.mesh) == "dp 4"
    assert found.mesh.dp.strategy == "zero2"
    assert found.mesh.dp.options == {"bucket_mb": 2e8 * 2 / 2**20}
    assert (found.train.batch, found.train.microbatches, found.train.dtype) == (32, 2, "bfloat16")
    assert (found.train.lr, found.train.betas, found.train.clip) == (3e-5, (0.8, 0.999), 1.0)
    assert "zero_optimization.overlap_comm" in notes[-1]
    assert plan(found)


def test_every_key_that_cannot_be_carried_over_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(write(tmp_path, CIFAR), ranks=2)
    lines = str(caught.value).splitlines()
    for key in (
        "scheduler.type",
        "scheduler.params.warmup_max_lr",
        "fp16.enabled",
        "zero_optimization.offload_param.device",
    ):
        assert any(f"cannot be carried over: {key} " in line for line in lines), key
    assert len(lines) == 6
    assert not any("gradient_clipping" in line or "initial_scale_power" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "strategy", "options"),
    [(FSDP2, "fsdp", {}), (FSDP1, "fsdp", {"reshard_after_forward": False})],
)
def test_an_fsdp_yaml_is_read(text: str, strategy: str, options: dict[str, Any], tmp_path: Path) -> None:
    found, _ = read(write(tmp_path, text))
    assert (found.mesh.dp.degree, found.mesh.dp.strategy, found.mesh.dp.options) == (8, strategy, options)
    assert found.train.dtype == "bfloat16"
    assert plan(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list"),
        ('{"train_batch_size": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ('{"train_batch_size": Infinity}', "train_batch_size inf: it has to be a whole number"),
        ('{"train_batch_size": true}', "train_batch_size True: it has to be a whole number"),
        ('{"train_batch_size": 8}', "how many data ranks there are. Say --ranks N"),
        ('{"train_batch_size": "many"}', "train_batch_size 'many': it has to be a whole number"),
        ('{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}', "train_batch_size 8: is not"),
        (
            '{"train_batch_size": 2, "train_micro_batch_size_per_gpu": 4}',
            "train_batch_size 2: is not train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 1 x 1 ranks",
        ),
        ('{"train_batch_size": 8, "hybrid_engine": {"enabled": true}}', "hybrid_engine.enabled True: it has no"),
        ('{"train_batch_size": 8, "zero_optimization": {"stage": 4}}', "zero_optimization.stage 4: there are 0 to 3"),
        ('{"train_batch_size": 8, "optimizer": {"type": "Lamb"}}', "optimizer.type Lamb"),
        ('{"train_batch_size": 8, "amp": {"enabled": true}}', "amp.enabled True: loss scaling is not here"),
        ('{"train_batch_size": 8, "bf16": {"enabled": true, "bf16_master_weights_and_grads": true}}', "it has no"),
        ('{"train_batch_size": 8, "data_types": {"grad_accum_dtype": "bf16"}}', "grad_accum_dtype bf16: it is fp32"),
        ("distributed_type: MEGATRON_LM", "distributed_type MEGATRON_LM"),
        ("distributed_type: 'NO'\nmixed_precision: fp8", "mixed_precision fp8"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: a.json}", "import that file itself"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_offload_params: true}", "fsdp_config.fsdp_offload_params True"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_new: 1}", "fsdp_config.fsdp_new 1: it has no counterpart"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(write(tmp_path, text))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("target", "ours", "said"),
    [
        ("deepspeed-yaml", config(), "is not one of"),
        ("deepspeed-json", config("fsdp"), "mesh.dp.strategy fsdp: nearest zero3"),
        ("deepspeed-json", config(train={"batch": 10}), "train.batch 10"),
        ("deepspeed-json", config(train={"dtype": "float64"}), "train.dtype float64"),
        ("deepspeed-json", config(mesh={"cp": {"degree": 2}}), "mesh.cp.degree 2"),
        ("accelerate-yaml", config(mesh={"pp": {"degree": 2}}), "mesh.pp.degree 2"),
        ("accelerate-yaml", config(mesh={"tp": {"degree": 2}}), "with DeepSpeed, Accelerate has one axis"),
    ],
)
def test_what_a_library_cannot_say_is_named(target: str, ours: Config, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        export(ours, target, Path("c.yaml"))
    assert said in str(caught.value)


def test_what_is_written_is_what_the_libraries_read() -> None:
    accelerate = pytest.importorskip("accelerate.commands.config.config_args", reason="accelerate is not installed")
    for strategy in ("ddp", "zero2", "fsdp"):
        tree = yaml.safe_load(export(config(strategy), "accelerate-yaml", Path("c.yaml")).text)
        del tree["compute_environment"], tree["mixed_precision"], tree["distributed_type"], tree["use_cpu"]
        accelerate.ClusterConfig(compute_environment="LOCAL_MACHINE", distributed_type="NO", mixed_precision="no",
                                 use_cpu=True, debug=False, **tree)  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "train"),
    [
        ("ddp", {"batch": 8}),
        ("zero2", {"batch": 24, "microbatches": 3, "dtype": "bfloat16"}),
        ("zero3", {"clip": None}),
    ],
)
def test_deepspeed_understands_what_is_written_for_it(
    strategy: str, train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed.runtime.config", reason="deepspeed is not installed")
    monkeypatch.setattr(deepspeed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed.dist, "get_world_size", lambda: 4)
    ours = config(strategy, train=train)
    found = deepspeed.DeepSpeedConfig(json.loads(export(ours, "deepspeed-json", Path("c.yaml")).text))  # checks sizes
    assert found.train_batch_size == ours.train.batch
    assert found.gradient_accumulation_steps == ours.train.microbatches
    assert found.train_micro_batch_size_per_gpu == ours.train.batch // (4 * ours.train.microbatches)
    assert found.zero_config.stage == ("ddp", "zero1", "zero2", "zero3").index(strategy)
    assert found.bfloat16_config.enabled == (ours.train.dtype == "bfloat16")
    assert found.gradient_clipping == (ours.train.clip or 0.0)
    assert (found.optimizer_name, found.optimizer_params["lr"]) == ("adamw", ours.train.lr)
