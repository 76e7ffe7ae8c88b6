import json
import os
import shutil
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.nn.parallel import DistributedDataParallel

from sandbox.comm import all_reduce
from sandbox.config import Config
from sandbox.data import Corpus
from sandbox.measure import Peak, Timeline, Traffic, align, held, interface_bytes
from sandbox.mesh import Mesh
from sandbox.model import build
from sandbox.plan import predict
from sandbox.predict import bytes_of
from sandbox.program import Program
from sandbox.recorder import Recorder
from sandbox.runtime import Member, launch
from sandbox.trainer import Trainer
from sandbox.verdict import Span

unit = pytest.mark.unit
parity = pytest.mark.parity

SHARDED = ["ddp", "zero1", "zero2", "zero3", "fsdp"]
MB = 2**20
EXPERTS = {"experts": 4, "top_k": 4}  # every token goes to all, so what is sent is known
PAIRS: dict[str, dict[str, Any]] = {
    # two ranks along one of the other axes
    "tensor": {"tp": {"degree": 2}},
    "tensor, sequence": {"tp": {"degree": 2, "sequence": True}},
    "ring": {"cp": {"degree": 2, "kind": "ring"}},
    "gather": {"cp": {"degree": 2, "kind": "gather"}},
    "ulysses": {"cp": {"degree": 2, "kind": "ulysses"}},
    "pipeline": {"pp": {"degree": 2}},
    "expert": {"dp": {"degree": 2}, "ep": {"degree": 2}},
}


def a_config(strategy: str = "ddp", ranks: int = 1, *, microbatches: int = 2, **more: Any) -> Config:
    tree: dict[str, Any] = {
        "mesh": {"dp": {"degree": ranks, "strategy": strategy}},
        "model": {"layers": 3, "width": 24, "heads": 4, "dropout": 0.1},
        "data": {"sequence": 24},
        "train": {"batch": 9, "microbatches": microbatches, "optimizer": "sgd_momentum", "dtype": "float64"},
    }
    return Config.model_validate(tree | more)


def a_trainer(config: Config, rank: int = 0) -> Trainer:
    mesh = Mesh(config.mesh.degrees, rank, "cpu" if config.mesh.world > 1 else None, Recorder())
    return Trainer(config, mesh, torch.device("cpu"), Corpus.load(config.data, config.model.vocab))


def step(trainer: Trainer) -> None:
    trainer.compute_gradients(trainer.batch())
    trainer.update()


def bare(module: nn.Module, **parameters: nn.Parameter) -> Program:
    """As much of a program as `held` and `Peak` look at."""
    return SimpleNamespace(model=module, parameters=parameters)  # type: ignore[return-value]


def no_state() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)])


# What is held


@unit
@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 0), ("sgd_momentum", 1), ("adamw", 2)])
def test_an_unsharded_rank_holds_parameters_gradients_and_state(optimizer: str, copies: int) -> None:
    config = a_config(train={"optimizer": optimizer, "dtype": "float64"})
    trainer = a_trainer(config)
    step(trainer)
    whole = bytes_of(build(config.model, "float64").parameters())
    assert held(trainer.program, trainer.optimizer) == {
        "parameters": whole,
        "gradients": whole,
        "optimizer": copies * whole,
    }


@unit
def test_a_view_holds_its_whole_storage_once() -> None:
    model = nn.Linear(10, 10, bias=False)
    row = nn.Parameter(model.weight.detach()[0])
    assert held(bare(model, row=row), no_state())["parameters"] == 400
    alone = nn.Parameter(row.detach().clone())
    assert held(bare(model, row=alone), no_state())["parameters"] == 440


@unit
def test_a_storage_shrunk_to_nothing_is_not_held() -> None:
    model = nn.Linear(10, 10, bias=False)
    model.weight.untyped_storage().resize_(0)
    assert held(bare(model), no_state())["parameters"] == 0


@unit
def test_a_gradient_inside_an_optimizers_state_is_counted_once() -> None:
    model = nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert held(bare(model), optimizer) == {"parameters": 400, "gradients": 400, "optimizer": 400}
    model.weight.grad = optimizer.state[model.weight]["momentum_buffer"]
    assert held(bare(model), optimizer) == {"parameters": 400, "gradients": 400, "optimizer": 0}


@unit
def test_an_optimizer_inside_an_optimizer_is_found() -> None:
    model = nn.Linear(10, 10, bias=False)
    inner = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(1, 10)).sum().backward()
    inner.step()
    outer = SimpleNamespace(optim=inner, state={})
    assert held(bare(model), outer)["optimizer"] == 400  # type: ignore[arg-type]


# The peak


@unit
def test_the_peak_is_what_a_hand_counts() -> None:
    model = nn.Linear(10, 10, bias=False)  # 400 bytes
    with Peak(bare(model), no_state(), by_kind=True) as peak:
        one = torch.zeros(1000)  # 4,000
        two = one + 1  # 8,000
        del one
        two.view(10, 100)[0].add_(1)  # views and in-place: nothing new
        three = torch.zeros(500)  # 6,000
        del two, three
    assert peak.bytes == 400 + 8000
    assert peak.kinds == {"parameters": 400, "gradients": 0, "optimizer": 0, "other": 8000}


@unit
def test_the_peak_counts_what_autograd_has_saved() -> None:
    x = torch.zeros(1000, requires_grad=True)
    with Peak(bare(nn.Linear(1, 1, bias=False)), no_state(), by_kind=True) as peak:
        y = x.exp()  # 4,000, saved for backward
        z = y.sum()
        del y
        torch.zeros(1000)
    assert peak.bytes == 4 + 4000 + 4 + 4000
    del z


@unit
def test_the_peak_follows_storages_that_grow_and_shrink() -> None:
    whole = torch.zeros(1000)
    model = nn.Linear(1, 1, bias=False)
    model.weight.data = whole
    whole.untyped_storage().resize_(0)
    resize_ = torch.UntypedStorage.resize_
    with Peak(bare(model), no_state(), by_kind=True) as peak:
        torch.zeros(500)
        whole.untyped_storage().resize_(4000)
        whole.untyped_storage().resize_(0)
        after = torch.zeros(900)
    assert peak.bytes == 4000
    assert peak.kinds["parameters"] == 4000
    assert after.numel() == 900
    assert torch.UntypedStorage.resize_ is resize_


@unit
def test_a_peak_goes_on_when_entered_again() -> None:
    peak = Peak(bare(nn.Linear(1, 1, bias=False)), no_state())
    with peak:
        kept = torch.zeros(1000)
    unseen = torch.zeros(1000)
    with peak:
        torch.zeros(500)
    assert peak.bytes == 4 + 4000 + 2000
    assert kept.shape == unseen.shape


@unit
def test_the_peak_agrees_with_the_allocator() -> None:
    trainer = a_trainer(a_config())
    step(trainer)
    batch = trainer.batch()
    trainer.optimizer.zero_grad()
    before = sum(held(trainer.program, trainer.optimizer).values())
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        trainer.compute_gradients(batch)
    changes = sorted((e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]")
    now = most = before
    for _, change in changes:
        now += change
        most = max(most, now)
    trainer.optimizer.zero_grad()
    with Peak(trainer.program, trainer.optimizer, by_kind=True) as peak:
        trainer.compute_gradients(batch)
    assert peak.bytes == pytest.approx(most, rel=1e-3)  # kernels have scratch memory of their own
    assert sum(peak.kinds.values()) == peak.bytes


@unit
def test_a_leak_shows_in_the_peak() -> None:
    peaks, kept = [], list[Tensor]()
    for leaks in (False, True):
        trainer = a_trainer(a_config(microbatches=1))
        step(trainer)
        if leaks:
            trainer.program.model.register_forward_hook(lambda *args: kept.append(args[-1].detach().clone()))
        with Peak(trainer.program, trainer.optimizer, by_kind=True) as peak:
            step(trainer)
        peaks.append(peak.bytes)
    assert peaks[1] - peaks[0] == 9 * 24 * 257 * 8


@unit
def test_measuring_changes_no_bit() -> None:
    runs = []
    for measured in (False, True):
        trainer = a_trainer(a_config())
        if measured:
            with Peak(trainer.program, trainer.optimizer), Traffic(trainer.mesh), Timeline(trainer):
                step(trainer)
        else:
            step(trainer)
        runs.append(dict(trainer.program.parameters))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


# Worlds


def amounts(member: Member, config: Config) -> tuple[dict[str, float], dict[str, int], int]:
    """Sent in the third step, held after it, the peak during its gradients."""
    trainer = a_trainer(config, member.rank)
    for _ in range(2):
        step(trainer)
    trainer.mesh.recorder.sent.clear()
    with Traffic(trainer.mesh):
        with Peak(trainer.program, trainer.optimizer, by_kind=True) as peak:
            trainer.compute_gradients(trainer.batch())
        trainer.update()
    sent = {k: v for k, v in trainer.mesh.recorder.sent.items() if v and k.split()[0] not in ("loss", "norm")}
    return sent, held(trainer.program, trainer.optimizer), peak.bytes


@parity
@pytest.mark.parametrize("strategy", SHARDED)
def test_native_strategies_send_and_hold_what_they_predict(strategy: str) -> None:
    config = a_config(strategy, 3)
    ranks = launch(3, amounts, config, timeout=60)
    predicted = predict(config)
    assert [sent for sent, _, _ in ranks] == [p.traffic for p in predicted], "what comm.py records is counted once"
    assert [kept for _, kept, _ in ranks] == [p.memory for p in predicted]


@parity
def test_sharding_lowers_the_peak() -> None:
    model = {"layers": 8, "width": 64, "heads": 4}
    peaks = {}
    for strategy in SHARDED:
        options = {"bucket_mb": 0.2} if strategy in ("ddp", "zero1", "zero2") else {}
        mesh = {"dp": {"degree": 4, "strategy": strategy, **options}}
        config = a_config(model=model, mesh=mesh, data={"sequence": 8}, microbatches=1)
        peaks[strategy] = max(peak for _, _, peak in launch(4, amounts, config, timeout=60))
    assert peaks["ddp"] > peaks["zero1"] > peaks["zero2"] > max(peaks["zero3"], peaks["fsdp"])


def every_collective(member: Member) -> dict[str, float]:  # noqa: PLR0915 - a line or two for each of many
    """Each collective of 12 float32 elements, on three ranks, past comm.py."""
    mesh = Mesh({"dp_shard": 3}, member.rank, "cpu")
    x, parts = torch.ones(12), [torch.ones(4) for _ in range(3)]
    many = [torch.ones(12) for _ in range(3)]
    pair = dist.new_group([0, 1])
    at_root = member.rank == 1
    group = dist.group.WORLD
    assert group
    seen: dict[str, float] = {}

    def note(name: str) -> None:
        sent = {key: value for key, value in mesh.recorder.sent.items() if value}
        mesh.recorder.sent.clear()
        assert len(sent) <= 1, (name, sent)
        seen[name] = next(iter(sent.values()), 0)
        if sent:
            assert name.partition(":")[0] == next(iter(sent)), (name, sent)

    with Traffic(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        dist.all_reduce(x)
        note("all_reduce dp_shard")
        dist.all_gather(many, x)
        note("all_gather dp_shard")
        dist.all_gather_into_tensor(torch.empty(36), x)
        note("all_gather dp_shard:into tensor")
        dist.reduce_scatter(torch.empty(4), parts)
        note("reduce_scatter dp_shard")
        dist.reduce_scatter_tensor(torch.empty(4), x)
        note("reduce_scatter dp_shard:tensor")
        dist.all_to_all_single(torch.empty(12), x)
        note("all_to_all dp_shard")
        splits = [1, 4, 7]
        dist.all_to_all_single(torch.empty(3 * splits[member.rank]), x, [splits[member.rank]] * 3, splits)
        note("all_to_all dp_shard:uneven")
        dist.broadcast(x, 1)
        note("broadcast dp_shard")
        dist.reduce(x, 1)
        note("reduce dp_shard")
        dist.gather(x, many if at_root else None, 1)
        note("gather dp_shard")
        dist.scatter(torch.empty(4), parts if at_root else None, 1)
        note("scatter dp_shard")
        if member.rank == 1:
            dist.send(x, 2)
        elif member.rank == 2:
            dist.recv(x, 1)
        note("send dp_shard")
        (functional.all_reduce(x, "sum", group) + 1).sum()
        note("all_reduce dp_shard:functional")
        (functional.reduce_scatter_tensor(x, "sum", 0, group) + 1).sum()
        note("reduce_scatter dp_shard:functional")
        dist.all_reduce(torch.ones(()))
        dist.all_reduce(torch.ones(5, dtype=torch.int64))
        note("control dp_shard")
        if member.rank < 2:
            dist.all_reduce(x, group=pair)
        note("all_reduce other")
        nn.utils.clip_grad_norm_(x, 1.0)
        dist.barrier()
        note("nothing")
        all_reduce(x, mesh.axis("dp_shard")).wait()
        note("all_reduce dp_shard:comm.py")
    return seen


@parity
def test_every_collective_of_a_library_is_counted_at_its_least() -> None:
    first, second, third = launch(3, every_collective, timeout=60)
    p = 48
    same = {
        "all_reduce dp_shard": 2 * 2 * p // 3,
        "all_gather dp_shard": 2 * p,
        "all_gather dp_shard:into tensor": 2 * p,
        "reduce_scatter dp_shard": 2 * p // 3,
        "reduce_scatter dp_shard:tensor": 2 * p // 3,
        "all_to_all dp_shard": 2 * p // 3,
        "all_reduce dp_shard:functional": 2 * 2 * p // 3,
        "reduce_scatter dp_shard:functional": 2 * p // 3,
        "control dp_shard": 4 * (4 + 40) / 3,
        "nothing": 0,
        "all_reduce dp_shard:comm.py": 2 * 2 * p // 3,
    }
    differ = {
        "all_to_all dp_shard:uneven": (p - 4, p - 16, p - 28),
        "broadcast dp_shard": (0, 2 * p, 0),
        "reduce dp_shard": (p, 0, p),
        "gather dp_shard": (p, 0, p),
        "scatter dp_shard": (0, 2 * p // 3, 0),
        "send dp_shard": (0, p, 0),
        "all_reduce other": (p, p, 0),
    }
    for rank, seen in enumerate((first, second, third)):
        assert seen == pytest.approx(same | {name: values[rank] for name, values in differ.items()})


def through_ddp(member: Member, extra: bool) -> dict[str, float]:
    """What torch's DDP sends in a step, on 2 x 2 ranks, its gradients summed over the inner axis."""
    mesh = Mesh({"dp_replicate": 2, "dp_shard": 2}, member.rank, "cpu")
    group = mesh.axis("dp_shard").group
    model = DistributedDataParallel(nn.Linear(20, 10), process_group=group)
    with Traffic(mesh):
        model(torch.ones(3, 20)).sum().backward()
        if extra:
            dist.all_reduce(torch.ones(100), group=mesh.axis("dp_replicate").group)
    return {key: sent for key, sent in mesh.recorder.sent.items() if sent and not key.startswith("control")}


@parity
def test_the_reducer_of_torchs_ddp_is_seen_and_so_is_a_planted_collective() -> None:
    assert launch(4, through_ddp, False, timeout=60) == [{"all_reduce dp_shard": 840}] * 4
    planted = {"all_reduce dp_shard": 840, "all_reduce dp_replicate": 400}
    assert launch(4, through_ddp, True, timeout=60) == [planted] * 4


# The timeline


def traced(member: Member, config: Config) -> tuple[list[Span], bool]:
    """Spans of the second step; whether the trainer is left as it was."""
    trainer = a_trainer(config, member.rank)
    trainer.train_step()
    program, recorder = trainer.program, trainer.mesh.recorder
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in program.model.modules())
    with Timeline(trainer) as spans:
        trainer.train_step()
    left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in program.model.modules())
    return spans, trainer.program is program and recorder.board is None and not recorder.detailed and hooks == left


@unit
def test_a_timeline_shows_every_part_forward_and_backward() -> None:
    trainer = a_trainer(a_config(microbatches=2))
    with Timeline(trainer) as spans:
        trainer.train_step()
    parts = ["embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    one = [f"forward {part}" for part in parts] + [f"backward {part}" for part in reversed(parts)] + ["backward"]
    assert [span.name for span in spans if span.lane == "compute"] == [*one, *one, "optimizer"]
    assert all(span.start <= span.end for span in spans)
    ends = [span.end for span in spans if span.lane == "compute"]
    assert ends == sorted(ends)


@parity
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_timeline_shows_collectives_and_no_computing_while_a_rank_waits(strategy: str) -> None:
    config = a_config(strategy, 2, microbatches=1)
    (first, clean), (second, _) = launch(2, traced, config, timeout=60)
    assert clean
    wanted = {"ddp": ["all_reduce"], "zero3": ["all_gather", "reduce_scatter"]}[strategy]
    for spans in align([first, second]):
        collectives = [span for span in spans if span.lane == "collective"]
        assert {span.name for span in collectives} >= {f"{op} dp_shard" for op in wanted}
        assert all(span.start < span.end for span in collectives)
        assert all(span.bytes for span in collectives)
        compute = sorted((span for span in spans if span.lane == "compute"), key=lambda span: span.start)
        assert all(one.end <= other.start for one, other in pairwise(compute)), "one at a time"
    sent = sum(span.bytes for span in first if span.lane == "collective" and span.name.split()[0] in wanted)
    assert sent == sum(predict(config)[0].traffic.values())


@unit
def test_ranks_are_aligned_to_the_first_start() -> None:
    def span(start: float) -> Span:
        return Span(lane="compute", name="forward", start=start, end=start + 1)

    one, other = align([[span(10.5), span(12)], [span(10)]])
    assert [(s.start, s.end) for s in (*one, *other)] == [(0.5, 1.5), (2, 3), (0, 1)]
    assert align([[], []]) == [[], []]


# The wire


@unit
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_interface_bytes_are_those_sent() -> None:
    before = interface_bytes("lo")
    assert isinstance(before, int)
    with pytest.raises(Exception, match="no network interface nowhere0"):
        interface_bytes("nowhere0")


def on_the_wire(member: Member, config: Config, steps: int) -> int:
    """Bytes that cross lo in the quietest of `steps` steps, after a first one that also opens connections.

    On a loaded machine the kernel now and then sends again what is acknowledged late.
    """
    trainer = a_trainer(config, member.rank)
    step(trainer)
    crossed = []
    for _ in range(steps):
        dist.barrier()
        before = interface_bytes("lo")
        dist.barrier()
        step(trainer)
        dist.barrier()
        crossed.append(interface_bytes("lo") - before)
    return min(crossed)


def gloo_reduce_scatter(member: Member, elements: int) -> int:
    whole, part = torch.ones(elements), torch.empty(elements // member.world)
    dist.barrier()
    before = interface_bytes("lo")
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.reduce_scatter_tensor(part, whole)
    dist.barrier()
    return interface_bytes("lo") - before


def wire_ratios(ranks: int, *, pairs: bool) -> dict[str, float]:
    """Bytes on the wire over bytes predicted, by strategy; run in a network namespace of one's own."""
    ratios = {}
    data = {strategy: {"dp": {"degree": ranks, "strategy": strategy}} for strategy in SHARDED}
    # the data axis sends parameters, the others send hidden states
    layers, columns = (2, 256) if pairs else (5, 8)
    for name, mesh in (PAIRS if pairs else data).items():
        model = {"layers": layers, "width": 192, "heads": 4, **(EXPERTS if "ep" in mesh else {})}
        train = {"batch": ranks, "dtype": "float32"}
        config = a_config(mesh=mesh, model=model, data={"sequence": columns}, train=train)
        least = sum(sum(p.traffic.values()) for p in predict(config))
        ratios[name] = launch(ranks, on_the_wire, config, 3, timeout=60)[0] / least
    elements = MB // 4 * 8
    ratios["gloo"] = launch(ranks, gloo_reduce_scatter, elements, timeout=60)[0] / ((ranks - 1) * 4 * elements)
    return ratios


@parity
@pytest.mark.cluster
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"),
    reason="a network namespace needs Linux, root, unshare and ip",
)
@pytest.mark.parametrize(("ranks", "pairs"), [(2, False), (4, False), (2, True)], ids=["data 2", "data 4", "others 2"])
def test_the_wire_carries_what_is_predicted(ranks: int, pairs: bool) -> None:
    code = f"import json, test_measure; print(json.dumps(test_measure.wire_ratios({ranks}, pairs={pairs})))"
    here = Path(__file__).parent
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$0" -c "$1"', sys.executable, code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parent)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ratios = json.loads(done.stdout.splitlines()[-1])
    assert ratios.pop("gloo") > 1.9, "gloo's own reduce_scatter sends twice what it must: the measurement can tell"
    assert all(1 <= ratio <= 1.05 for ratio in ratios.values()), ratios
