"""Parameters that are gathered on use and freed after it: the machinery that ZeRO-3 and FSDP share.

A unit is what is gathered together: each block, the embedding, and the final norm with the head. Between uses a rank
holds only its part of it, [N_dp] of [N] elements. In forward and again in backward,

    wait for this unit  ->  start to gather the next one  ->  compute this one  ->  free this one

so that bytes travel while the rank computes, and two units at most are whole at once. The last block and the head
are kept from forward to backward, for they would be gathered again at once; backward of the embedding needs no weight.
A unit's gradients are reduced as soon as they are complete, and its parameters freed with them, on all ranks before the
next one is gathered: collectives are to start in one order.
Experts that are cut over ep are a part of their block's unit, gathered and reduced over ranks of their own.
In a pipeline, whose microbatches take turns, units stay whole from their first use in a step to their last.

To free is to shrink the storage to nothing: the parameters, and what autograd saved of them, stay valid views of it and
are whole again when the storage is filled again. (In between there is nothing to read: not even for `state_dict`.)
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as unchanged_version

from sandbox.arrivals import Arrivals, on_gradients
from sandbox.buckets import Bucket, Over, ScatterSum, reduce_in_backward, summed_over
from sandbox.comm import Axis, Pending, all_gather, own_part, ring_bytes
from sandbox.config import Config
from sandbox.mesh import Mesh
from sandbox.partition import Partition
from sandbox.predict import Prediction, state_copies
from sandbox.program import Program, replace_parameters, shard_rows

__all__ = ["Cut", "gather_on_use", "predict_units"]

AXES = ("dp_shard", "ep", "cp")

Cut = Callable[[Mapping[str, nn.Parameter], int], Partition]
"""(parameters of a unit, number of ranks) -> what each rank holds: `by_ranges` or `by_rows` of partition.py."""


@dataclass
class Unit:
    """One unit. `kept`: whole from forward to backward even if others are freed in between."""

    name: str
    modules: list[nn.Module]  # that use it, in forward order
    params: dict[str, nn.Parameter]
    kept: bool


def cut_units(model: nn.Module) -> list[Unit]:
    """The units of a model, in forward order: each of its `blocks`, its `embed`, and its `norm` with its `head`.

    With tied weights embedding, norm and head are one, and kept. So is what lies in none of these.
    """
    names = dict(model.named_parameters())
    outer = {key: getattr(model, key) for key in ("embed", "norm", "head") if getattr(model, key, None) is not None}
    blocks = list(model.get_submodule("blocks").named_children())

    def unit(name: str, modules: list[nn.Module], kept: bool) -> Unit:
        inside = {id(p) for module in modules for p in module.parameters()}
        return Unit(name, modules, {n: p for n, p in names.items() if id(p) in inside}, kept)

    units = [unit(f"blocks.{key}", [block], kept=block is blocks[-1][1]) for key, block in blocks]
    ends = [module for key, module in outer.items() if key != "embed"]
    embed = [outer["embed"]] if "embed" in outer else []
    inside = {id(p) for module in (*outer.values(), *(block for _, block in blocks)) for p in module.parameters()}
    if any(id(p) not in inside for p in names.values()):
        within = {id(p) for _, block in blocks for p in block.parameters()}
        rest = {name: p for name, p in names.items() if id(p) not in within}
        return [Unit("root", [model], rest, kept=True), *units]
    if embed and ends and any(p is q for p in embed[0].parameters() for e in ends for q in e.parameters()):
        return [unit("root", [*embed, *ends], kept=True), *units]
    first = [unit("embed", embed, kept=False)] if embed else []
    last = [unit("head", ends, kept=True)] if ends else []
    return [*first, *units, *last]


def parts(unit: Unit, over: Over) -> list[tuple[Unit, Axis]]:
    """The unit by the ranks over which its parameters are cut: the block, and apart from it experts that ep cuts."""
    groups: dict[tuple[str, ...], dict[str, nn.Parameter]] = {}
    for name, param in unit.params.items():
        groups.setdefault(over(name).names, {})[name] = param
    return [(replace(unit, params=params), over(next(iter(params)))) for params in groups.values()]


def following(units: list[Unit], config: Config) -> list[Collection[str]]:
    """By unit: the parameters that backward is through with when it has all gradients of the unit's output.

    A root's last output comes first, and tells nothing of what follows it. A pipeline's schedule tells by itself.
    """
    if config.mesh.pp.degree > 1:
        return [()] * len(units)
    after: list[Collection[str]] = [*(unit.params for unit in units[1:]), ()]
    return [() if unit.name == "root" else names for unit, names in zip(units, after, strict=True)]


class Landing:
    """Memory in which rows arrive, of one unit after another: in new memory the kernel would clear pages first."""

    def __init__(self) -> None:
        self._free: Tensor | None = None

    def take(self, numel: int, like: Tensor) -> Tensor:
        """A flat tensor of at least `numel` elements, to `give` back: new if the last is not back, or too small."""
        flat, self._free = self._free, None
        return flat if flat is not None and flat.numel() >= numel else like.new_empty(numel)

    def give(self, flat: Tensor) -> None:
        """Return what was taken."""
        self._free = flat


class Shard:
    """A unit's parameters: this rank's part for good, all of them while they are in use."""

    def __init__(
        self, unit: Unit, cut: Cut, axis: Axis, landing: Landing, program: Program, dtype: torch.dtype
    ) -> None:
        self.partition = cut(unit.params, axis.size)
        self.sizes, self.axis, self.landing = self.partition.sizes, axis, landing
        own = []
        for name, (start, stop) in self.partition.spans[axis.rank].items():
            local = program.layout[name].take(program.initial(name))  # one parameter whole at a time
            own.append(local.reshape(-1)[start:stop].clone())
        self.part = torch.cat(own)
        self.pieces = {name: nn.Parameter(piece) for name, piece in self.partition.pieces(self.part, axis.rank).items()}
        compute = cast(torch.dtype, program.model.dtype)
        self.whole = torch.empty(sum(self.sizes), dtype=compute, device=self.part.device)
        params = {name: nn.Parameter(view) for name, view in Bucket(unit.params).views(self.whole).items()}
        self.bucket = Bucket(params, self.partition, dtype)
        self._homes = self.partition.homes(self.whole)
        for param in params.values():
            param.grad_dtype = dtype
        self._bytes = self.whole.untyped_storage().nbytes()
        self._pending: tuple[Pending, Tensor] | None = None
        self.is_whole = True
        self.free()

    def start(self) -> None:
        """Start to gather, if there is anything to do."""
        if self.is_whole or self._pending:
            return
        numel = sum(self.sizes)
        landing = self.landing.take(numel, self.whole) if self.partition.rows else self._grown()
        flat = landing[:numel]
        with torch.no_grad(), unchanged_version(self.whole):
            own_part(flat, self.sizes, self.axis).copy_(self.part)
        self._pending = all_gather(flat, self.sizes, self.axis), landing

    def use(self) -> None:
        """Wait until the parameters are whole."""
        self.start()
        if self._pending:
            (pending, landing), self._pending = self._pending, None
            landed = pending.wait()
            if self.partition.rows:
                self._grown()
                with torch.no_grad(), unchanged_version(self.whole):
                    self.partition.unflatten(landed, self._homes)
                self.landing.give(landing)
            self.is_whole = True

    def _grown(self) -> Tensor:
        self.whole.untyped_storage().resize_(self._bytes)
        return self.whole

    def free(self) -> None:
        """Let go of what other ranks hold."""
        if self.is_whole:
            self.whole.untyped_storage().resize_(0)
            self.is_whole = False


def cut_shards(units: list[Unit], cut: Cut, over: Over, program: Program, dtype: torch.dtype) -> list[list[Shard]]:
    """By unit, the shards of its parts; those over the same ranks, of which one at a time arrives, share a landing."""
    landings = defaultdict[tuple[str, ...], Landing](Landing)
    return [
        [Shard(part, cut, axis, landings[axis.names], program, dtype) for part, axis in parts(unit, over)]
        for unit in units
    ]


def gather_on_use(
    program: Program, mesh: Mesh, cut: Cut, *, reshard_after_forward: bool, each: bool, prefetch: bool
) -> Program:
    """Return `program` with parameters, gradients and optimizer state cut over dp_shard x cp by `cut`.

    `reshard_after_forward`: free a unit between forward and backward. `each`: reduce gradients after each microbatch,
    not after the last only. `prefetch`: start to gather the next unit while this one computes.
    """
    over, units = summed_over(program.model, mesh, *AXES), cut_units(program.model)
    compute = cast(torch.dtype, program.model.dtype)
    reshard_after_forward &= program.config.mesh.pp.degree == 1  # a pipeline would gather anew for each microbatch
    dtype = torch.promote_types(compute, torch.float32) if adds_up(program.config, each=each) else compute
    of_unit = cut_shards(units, cut, over, program, dtype)
    shards = [shard for some in of_unit for shard in some]
    home = [number for number, some in enumerate(of_unit) for _ in some]
    replace_parameters(program.model, {name: p for shard in shards for name, p in shard.bucket.params.items()})
    sums = ScatterSum([shard.axis for shard in shards], mesh.axis("dp_replicate"), shards[0].part.dtype)

    def use(number: int, following: int) -> None:
        for shard in of_unit[number]:
            shard.use()
        for shard in of_unit[following] if prefetch and 0 <= following < len(units) else ():
            shard.start()

    def watch(number: int, unit: Unit) -> None:
        def before(module: nn.Module, args: Any) -> None:
            first = module is unit.modules[0]
            if first and module.training:
                if number in seen:
                    busy.add(number)  # forward for the second time in a pass: backward recomputes it
                seen.add(number)
            use(number, number + 1 if first and number + 1 not in seen else -1)

        def after(module: nn.Module, args: Any, out: Any) -> None:
            if torch.is_grad_enabled():
                on_gradients(out, lambda: enter_backward(number), lambda: arrivals.close(followers[number]))
                if unit.kept or not reshard_after_forward or number in busy:
                    return
            for shard in of_unit[number]:
                shard.free()

        for module in unit.modules:
            module.register_forward_pre_hook(before, prepend=True)  # other hooks may read the parameters
        unit.modules[-1].register_forward_hook(after)

    arrivals, followers = Arrivals(program.model), following(units, program.config)
    # Units whose forward has begun in this pass, and whose backward has: those a recomputed forward must not free.
    seen, busy = set[int](), set[int]()

    for number, unit in enumerate(units):
        watch(number, unit)

    def begin(final: bool) -> None:
        program.begin(final)
        seen.clear()

    def enter_backward(number: int) -> None:
        busy.add(number)
        if units[number].name != "embed":  # its backward needs the tokens, not the weight
            use(number, number - 1 if number and units[number - 1].name != "embed" else -1)

    def launch(reverse: int, final: bool) -> None:
        number = len(shards) - 1 - reverse
        if final or reshard_after_forward:
            shards[number].free()
        busy.discard(home[number])
        if final or each:
            sums.launch(number, shards[number].bucket.take(), shards[number].sizes, final)

    def finish(final: bool) -> None:
        if not final:
            return
        sums.finish()
        for number, shard in enumerate(shards):
            for name, grad in shard.partition.pieces(sums.sums.pop(number), shard.axis.rank).items():
                shard.pieces[name].grad = grad

    sharded = replace(
        program,
        parameters={name: piece for shard in shards for name, piece in shard.pieces.items()},
        layout={
            name: shard.partition.layout(name, shard.axis.rank, program.layout[name], shard.axis.names)
            for shard in shards
            for name in shard.pieces
        },
        shard_batch=shard_rows(program, mesh),
        begin=begin,
    )
    return arrivals.watch(
        reduce_in_backward(sharded, [shard.bucket for shard in reversed(shards)], launch, finish, each=True)
    )


def adds_up(config: Config, *, each: bool) -> bool:
    """Whether gradients of several microbatches add up before they are reduced, which wants the full precision."""
    return config.train.microbatches > 1 and (config.mesh.pp.degree > 1 or not each)


def predict_units(
    model: nn.Module, mesh: Mesh, cut: Cut, config: Config, *, reshard_after_forward: bool, each: bool
) -> Prediction:
    """Bytes that this rank sends in one step and holds after it, with units cut by `cut`."""
    over, replicate = summed_over(model, mesh, *AXES), mesh.axis("dp_replicate")
    item = next(model.parameters()).element_size()
    short = 2 if config.train.dtype == "bfloat16" else item  # what is gathered, and what backward yields
    passes = config.passes
    reshard_after_forward &= config.mesh.pp.degree == 1
    traffic: dict[str, float] = defaultdict(float)
    held = 0
    for unit, axis in (one for whole in cut_units(model) for one in parts(whole, over)):
        sizes = cut(unit.params, axis.size).sizes
        part, whole = sizes[axis.rank], sum(sizes)
        twice = reshard_after_forward and not unit.kept and unit.name != "embed"
        uses = passes * (1 + twice) if reshard_after_forward else 1
        traffic[f"all_gather {axis.name}"] += uses * (axis.size - 1) * part * short
        reduced = (passes if each else 1) * (whole - part) * (item if adds_up(config, each=each) else short)
        traffic[f"reduce_scatter {axis.name}"] += reduced
        traffic[f"all_reduce {replicate.name}"] += ring_bytes(part * item, replicate.size)
        held += part * item
    memory = {"parameters": held, "gradients": held, "optimizer": state_copies(config.train) * held}
    return Prediction(traffic, memory)
