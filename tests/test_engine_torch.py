import functools
import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sandbox.engines.torch
from sandbox.config import Config
from sandbox.data import Corpus
from sandbox.engines.torch import fsdp, zero1
from sandbox.errors import ConfigError, UnsupportedError
from sandbox.layout import local
from sandbox.mesh import Mesh
from sandbox.model import build
from sandbox.plan import find, predict, strategies
from sandbox.runtime import Member, launch
from sandbox.trainer import Trainer

parity = pytest.mark.parity
unit = pytest.mark.unit

MODEL = {"layers": 2, "width": 24, "heads": 4, "kv_heads": 2, "hidden": 37, "bias": True, "norm": "layer", "tied": True}


def config(strategy: str, degree: int, **options: object) -> Config:
    return Config.model_validate(
        {
            "engine": "torch",
            "mesh": {"dp": {"degree": degree, "strategy": strategy, **options}},
            "model": MODEL,
            "data": {"sequence": 16, "mask": "ragged"},
            "train": {"batch": 9, "microbatches": 2, "dtype": "float64"},
        }
    )


def trainer_of(member: Member, setup: Config) -> Trainer:
    mesh = Mesh(setup.mesh.degrees, member.rank, member.device)
    return Trainer(setup, mesh, torch.device(member.device), Corpus.load(setup.data))


run = functools.partial(launch, timeout=60)


@unit
@pytest.mark.parametrize(("name", "nearest"), [("zero2", "fsdp"), ("zero3", "fsdp"), ("context", "engine native")])
def test_what_torch_lacks_is_refused_with_a_reason_and_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"engine torch cannot run {name}: .*{nearest}"):
        find("torch", name)
    assert name in sandbox.engines.torch.UNSUPPORTED
    assert "fsdp" in strategies("torch")


def sharded_attention(member: Member) -> str:
    """What torch says when attention runs under its `context_parallel`."""
    from torch.distributed.tensor.experimental import context_parallel

    mesh = dist.device_mesh.init_device_mesh("cpu", (member.world,))
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    with (
        pytest.raises(NotImplementedError) as caught,
        context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]),
    ):
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return str(caught.value)


@parity
def test_torch_still_has_no_rule_for_the_attention_kernel_of_a_cpu() -> None:
    reason = sandbox.engines.torch.UNSUPPORTED["context"]
    for message in run(2, sharded_attention):
        assert "aten._scaled_dot_product_flash_attention_for_cpu" in message
        assert "does not have a sharding strategy" in message
    assert "no sharding rule" in reason
    assert "_scaled_dot_product_flash_attention_for_cpu" in reason


@unit
@pytest.mark.filterwarnings("ignore:.torch.jit")  # the import itself warns
def test_torch_still_shards_no_gradients_in_its_optimizers() -> None:
    from torch.distributed import optim

    assert [name for name in optim.__all__ if "zero" in name.lower()] == ["ZeroRedundancyOptimizer"]
    settings = inspect.signature(optim.ZeroRedundancyOptimizer.__init__).parameters
    assert not [name for name in settings if "grad" in name or "stage" in name]


@unit
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 5, 24, 37, 257])
def test_rows_are_dealt_out_as_torch_chunks_them(rows: int, ranks: int) -> None:
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)]
    assert [fsdp.own_rows(rows, ranks, rank) for rank in range(ranks)] == chunks + [0] * (ranks - len(chunks))


@unit
def test_fsdp_with_nothing_to_cut_is_refused_before_it_runs() -> None:
    setup = config("fsdp", 2, replicas=2)
    with pytest.raises(ConfigError, match=r"mesh\.dp\.replicas 2: .*, or mesh\.dp\.strategy: ddp"):
        predict(setup)


def state_held(member: Member, setup: Config) -> tuple[int, float, set[float]]:
    """Elements of optimizer state on this rank, and the settings that its optimizer used."""
    trainer = trainer_of(member, setup)
    trainer.train_step()
    optimizer: Any = trainer.optimizer
    owned = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    optimizer.step()
    inner = optimizer.optim.param_groups
    return owned, inner[0]["lr"], {group["weight_decay"] for group in inner}


@parity
def test_zero1_knows_what_each_rank_owns_and_hands_settings_on() -> None:
    setup = config("zero1", 3)
    held = run(3, state_held, setup)
    assert [owned for owned, _, _ in held] == zero1.owned_elements(build(setup.model, setup.train.dtype), 3)
    assert all((rate, decays) == (0.125, {0.0, setup.train.weight_decay}) for _, rate, decays in held)


def storage_held(member: Member, setup: Config) -> tuple[int, int, bool]:
    """Bytes of parameters on this rank, the largest tensor that was made for them, and whether weights are tied."""
    trainer = trainer_of(member, setup)
    parameters = trainer.program.parameters
    held = sum(local(p).untyped_storage().nbytes() for p in parameters.values())
    trainer.train_step()
    model = trainer.program.model
    tied = model.get_parameter("head.weight") is model.get_parameter("embed.weight") is parameters["embed.weight"]
    return held, sum(local(p).numel() for p in parameters.values()) * 8, tied


@parity
def test_fsdp_ranks_hold_their_rows_only_and_keep_weights_tied() -> None:
    setup = config("fsdp", 3)
    predictions = predict(setup)
    for (before, after, tied), prediction in zip(run(3, storage_held, setup), predictions, strict=True):
        assert before == after <= prediction.memory["parameters"]  # where padding counts too
        assert tied


def reduced(member: Member, dtype: torch.dtype, divide: bool, sums: bool) -> float:
    """The gradient of a weight of which rank r wants r + 1."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    unit = fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (member.world,)))
    if divide:
        unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(sums)
    (model(torch.ones(1, 1, dtype=dtype)) * (member.rank + 1)).sum().backward()
    assert isinstance(model.weight.grad, DTensor)
    return model.weight.grad.full_tensor().item()


@parity
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fsdp_averages_on_gloo_unless_told_to_sum(dtype: torch.dtype) -> None:
    """A report says that it sums (pytorch issue 162338)."""
    assert run(2, reduced, dtype, False, False) == [1.5, 1.5]
    assert run(2, reduced, dtype, True, True) == [3.0, 3.0]


def refusal(member: Member) -> str:
    with pytest.raises(RuntimeError) as caught:
        reduced(member, torch.float32, True, False)
    return str(caught.value)


@parity
def test_gloo_still_lacks_the_reduction_that_a_divisor_of_one_asks_for() -> None:
    assert all("PREMUL_SUM" in message for message in run(2, refusal))


def summed(member: Member, hook: bool) -> list[float]:
    """The gradient after each of two synchronised passes; ranks want 1 and 2 of it, so both passes add 3."""
    model = DistributedDataParallel(nn.Linear(1, 1, bias=False))
    scale = member.world
    if hook:
        model.register_comm_hook(None, add)
        scale = 1
    seen = []
    for _ in range(2):
        (model(torch.ones(1, 1)) * (member.rank + 1) * scale).sum().backward()
        seen.append(model.module.weight.grad.item())
    return seen


def add(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


@parity
def test_ddp_reduces_accumulated_gradients_so_losses_are_scaled_instead_of_summed_by_a_hook() -> None:
    assert run(2, summed, False) == [[3.0, 6.0]] * 2
    assert run(2, summed, True) == [[3.0, 9.0]] * 2  # 2 x 3 + 3: right is 6
