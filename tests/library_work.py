"""What ranks do to show how a library behaves by itself, without the adapters of sandbox.engines."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sandbox.config import Config
from sandbox.engines.accelerate._accelerator import make_accelerator
from sandbox.engines.deepspeed import _cpu_adam, _engine
from sandbox.runtime import Member
from sandbox.trainer import Trainer
from sandbox.verify.reference import _runs, _wholes, nudge

Tensors = dict[str, Tensor]


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """One weight of 1."""
    layer = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.ones_(layer.weight)
    return layer


# FairScale


def sharded_ddp(
    member: Member, passes: int = 1, *, no_sync: bool = True, to_none: bool = True, **settings: Any
) -> list[float]:
    """A gradient at its owner, rank 0, in three steps of ShardedDDP.

    In every pass rank r wants r + 1 of it, so on two ranks 1.5 a pass is right.
    """
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim import OSS

    layers = nn.Sequential(linear(), linear(), linear())
    oss = OSS(layers.parameters(), torch.optim.SGD, lr=0.0)
    model = ShardedDataParallel(layers, oss, **settings)
    seen = []
    for _ in range(3):
        model.zero_grad(set_to_none=to_none)
        if to_none:
            for param in layers.parameters():
                param.grad = None
        for number in range(passes):
            with model.no_sync() if no_sync and number < passes - 1 else nullcontext():
                (model(torch.ones(1, 1)) * (member.rank + 1)).sum().backward()
        grad = layers[0].weight.grad
        seen.append(0.0 if grad is None else grad.item())
        oss.step()
    return seen


def oss_norm(member: Member, groups: int) -> float:
    """The norm by OSS of a gradient of 1, in `groups` groups of ranks that each hold all of it."""
    from fairscale.optim import OSS

    size = member.world // groups
    parts = [dist.new_group(list(range(start, start + size))) for start in range(0, member.world, size)]
    layer = linear()
    oss = OSS(layer.parameters(), torch.optim.SGD, group=parts[member.rank // size], lr=0.0)
    layer.weight.grad = torch.ones_like(layer.weight)
    return oss.clip_grad_norm(1e9).item()


def fairscale_fsdp(member: Member, dtype: torch.dtype, step: Callable[[nn.Module], Any]) -> str:
    """The error that FairScale's FSDP raises on CPU, or nothing."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    try:
        step(FullyShardedDataParallel(linear(dtype), compute_device=torch.device("cpu")))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def forward(model: nn.Module) -> None:
    model(torch.ones(1, 1, dtype=next(model.parameters()).dtype))


def clip(model: Any) -> None:
    model.clip_grad_norm_(1.0)


# Accelerate


def prepared(member: Member, multi_device: bool) -> str:
    """What Accelerate makes of a model when it is given an FSDP plugin on CPU."""
    from accelerate import FullyShardedDataParallelPlugin

    accelerator = make_accelerator(
        multi_device=multi_device,
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
        ),
    )
    layer = linear()
    model, _ = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.0))
    return type(model).__name__


def parallelism(member: Member) -> str:
    from accelerate import ParallelismConfig

    try:
        make_accelerator(parallelism_config=ParallelismConfig(dp_shard_size=member.world))
    except ValueError as error:
        return str(error)
    return ""


def mean_of_means(member: Member, counts: list[list[int]]) -> float:
    """Gradient by the loop of Accelerate's documentation, each microbatch's loss its own mean.

    Rank r's microbatch m has counts[r][m] tokens, and each of its tokens wants counts[r][m] of the weight.
    """
    mine = counts[member.rank]
    accelerator = make_accelerator(gradient_accumulation_steps=len(mine))
    layer = linear(torch.float64)
    model, _ = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.0))
    for count in mine:
        with accelerator.accumulate(model):
            accelerator.backward((model(torch.ones(count, 1, dtype=torch.float64)) * count).mean())
    assert layer.weight.grad is not None
    return layer.weight.grad.item()


def plugin_steps(member: Member) -> tuple[float, float]:
    """The weight after `backward` under the DeepSpeed plugin, and after the optimizer's step."""
    from accelerate import DeepSpeedPlugin

    _engine.prepare()
    settings = _engine.settings(Config(), {"stage": 1, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000})
    accelerator = make_accelerator(multi_device=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    layer = linear()
    engine, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.5))
    accelerator.backward(engine(torch.ones(1, 1)).sum())
    after = layer.weight.item()
    optimizer.step()
    return after, layer.weight.item()


def accelerate_tensor(member: Member) -> str:
    from accelerate import ParallelismConfig

    accelerator = make_accelerator(multi_device=True, parallelism_config=ParallelismConfig(tp_size=member.world))
    try:
        accelerator.prepare(linear())
    except NotImplementedError as error:
        return str(error)
    return ""


def context_parallel(member: Member) -> str:
    """What torch's context parallelism, which Accelerate's is, says of attention on CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    q, k, v = (torch.ones(1, 2, 8, 4) for _ in range(3))
    try:
        with context_parallel(init_device_mesh("cpu", (member.world,)), buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    except NotImplementedError as error:
        return str(error)
    return ""


# DeepSpeed


def deepspeed_engine(member: Member, stage: int, dtype: torch.dtype, **settings: Any) -> tuple[Any, nn.Linear, Any]:
    _engine.prepare()
    import deepspeed

    torch.manual_seed(0)
    layer = nn.Linear(3, 5, bias=False, dtype=dtype)
    inner = torch.optim.SGD(layer.parameters(), lr=0.5)
    config = _engine.settings(Config(), {"stage": stage}) | settings
    engine, *_ = deepspeed.initialize(model=layer, optimizer=inner, dist_init_required=False, config=config)
    return engine, layer, inner


def deepspeed_dtype(member: Member, stage: int, half: bool) -> str:
    """The dtype in which DeepSpeed steps a float64 model, or its refusal. `half`: the CPU computes in float16."""
    _engine.prepare()
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: half
    try:
        engine, _, inner = deepspeed_engine(member, stage, torch.float64)
        engine.backward(engine(torch.ones(1, 3, dtype=torch.float64)).sum())
        engine.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    owned = engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else inner.param_groups[0]["params"]
    return str(owned[0].dtype)


def deepspeed_norm(member: Member, stage: int) -> float | None:
    engine, _, _ = deepspeed_engine(member, stage, torch.float32, gradient_clipping=1.0)
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def deepspeed_mix(member: Member) -> str:
    try:
        deepspeed_engine(member, 0, torch.float32, bf16={"enabled": True})
    except NotImplementedError as error:
        return str(error)
    return ""


def stays_whole(member: Member) -> bool:
    """Whether DeepSpeed's stage 3 leaves a small parameter whole by default."""
    _, layer, _ = deepspeed_engine(member, 3, torch.float32)
    return bool(layer.weight.ds_persist)  # type: ignore[union-attr]


def public_and_ours(member: Member, stage: int) -> tuple[Tensor, Tensor | None, int]:
    """A gradient by DeepSpeed's public accessor, this rank's fragment, and where that begins."""
    from deepspeed.utils import safe_get_full_grad, safe_get_local_grad

    engine, layer, _ = deepspeed_engine(member, stage, torch.float32)
    engine.backward((engine(torch.arange(3.0)[None]) * (member.rank + 1)).sum())
    weight: Any = layer.weight
    if stage == 3:
        part = safe_get_local_grad(weight)
        return safe_get_full_grad(weight).clone(), part.clone(), member.rank * part.numel()
    found = weight._hp_mapping
    own = found and found.get_lp_grad_fragment(weight._index_in_param_group).clone()
    return safe_get_full_grad(weight).clone(), own, found.lp_fragment_address.start if found else 0


def pipeline_clip(member: Member) -> float:
    """The norm of a stage's gradient after DeepSpeed's pipeline has clipped the whole to 1."""
    _engine.prepare()
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    torch.manual_seed(0)
    model = PipelineModule(
        [LayerSpec(nn.Linear, 3, 3)] * member.world,
        member.world,
        loss_fn=lambda out, target: 100 * (out - target).square().sum(),
        partition_method="uniform",
    )
    config = _engine.settings(Config(), {"stage": 0}) | {"gradient_clipping": 1.0, "steps_per_print": None}
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=inner, dist_init_required=False, config=config)
    grads: list[Tensor] = []
    inner.register_step_pre_hook(lambda *_: grads.extend(p.grad.clone() for p in model.parameters()))
    engine.train_batch(iter([(torch.ones(1, 3), torch.zeros(1, 3))] * 2))
    return torch.cat([grad.flatten() for grad in grads]).norm().item()


def pipeline_with_zero(member: Member, stage: int) -> str:
    """What DeepSpeed's pipeline says of a stage of ZeRO."""
    _engine.prepare()
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model = PipelineModule([LayerSpec(nn.Linear, 3, 3)] * member.world, member.world, partition_method="uniform")
    config = _engine.settings(Config(), {"stage": stage}) | {"steps_per_print": None}
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    try:
        deepspeed.initialize(model=model, optimizer=inner, dist_init_required=False, config=config)
    except AssertionError as error:
        return str(error)
    return ""


def groups_of_a_stage(member: Member) -> int:
    """Parameter groups of ZeRO-1 on a stage, of which the first has a matrix and no vector, and others have both."""
    _engine.prepare()
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    layers = [LayerSpec(nn.Linear, 3, 3, bias=stage > 0) for stage in range(member.world)]
    model = PipelineModule(layers, member.world, partition_method="uniform")
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.dim() == dim]} for dim in (2, 1)]
    config = _engine.settings(Config(), {"stage": 1, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000})
    inner = torch.optim.SGD(groups, lr=1.0)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=inner, dist_init_required=False, config=config | {"steps_per_print": None}
    )
    return len(engine.optimizer.bit16_groups)


def ends_forget_each_other(trainer: Trainer) -> None:
    """A tied weight's gradients are not summed over the two ends of DeepSpeed's pipeline."""
    instructions = trainer.optimizer.engine._INSTRUCTION_MAP  # type: ignore[attr-defined]
    for kind in instructions:
        if kind.__name__ == "ReduceTiedGrads":
            instructions[kind] = lambda engine: None


def replicas_forget_each_other(trainer: Trainer) -> None:
    """Each of DeepSpeed's pipelines keeps the gradients of its own rows."""
    trainer.optimizer.engine.pipeline_enable_backward_allreduce = False  # type: ignore[attr-defined]


def reference_parameters(member: Member, config: Config) -> list[Tensors]:
    """After the last step of the unsharded run, and of its neighbours."""
    return [_wholes(run, "parameters")[-1] for run in _runs(member, config, nudge, None)[0]]


def steps_by_its_own(trainer: Trainer) -> None:
    """Change nothing, but see whose AdamW it is."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    inner = trainer.optimizer.engine.optimizer.optimizer  # type: ignore[attr-defined]
    assert type(inner) is DeepSpeedCPUAdam


def decays_into_the_gradient(trainer: Trainer) -> None:
    """DeepSpeed's `adamw_mode=False`: Adam with the decay in its gradient."""
    adam = trainer.optimizer.optim  # type: ignore[attr-defined]
    adam.ds_opt_adam.create_adam(adam.opt_id, 0.0, 0.0, 0.0, 1e-8, 0.0, False, False)


def bias_is_not_corrected(trainer: Trainer) -> None:
    for group in trainer.optimizer.param_groups:
        group["bias_correction"] = False


def forgets_to_decay(trainer: Trainer) -> None:
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.0


def paused(member: Member) -> tuple[Tensor, Tensor, Tensor]:
    """A parameter after steps straight on; after a pause; and after one with nothing but its state loaded."""
    _engine.prepare()

    def adam() -> tuple[nn.Parameter, Any]:
        param = nn.Parameter(torch.linspace(-1, 1, 1000))
        return param, _cpu_adam.optimizer(torch.optim.AdamW([param], lr=0.01, betas=(0.9, 0.95)), offload=True)

    def steps(param: nn.Parameter, optimizer: Any, numbers: range) -> Tensor:
        for number in numbers:
            param.grad = torch.linspace(1, 2 + number, 1000).sin()
            optimizer.step()
        return param.detach().clone()

    straight_on = steps(*adam(), range(20))
    ends = []
    for catch_up in (_cpu_adam.catch_up, lambda optimizer: None):
        param, optimizer = adam()
        before = steps(param, optimizer, range(9))
        again, resumed = adam()
        with torch.no_grad():
            again.copy_(before)
        resumed.state[again] = optimizer.state[param]
        catch_up(resumed)
        ends.append(steps(again, resumed, range(9, 20)))
    return straight_on, ends[0], ends[1]
