"""A strategy in words, and its formulas in bytes."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sandbox.config import Config, Mesh, check
from sandbox.model import build
from sandbox.plan import USUAL, Strategy, find, predict
from sandbox.predict import Prediction
from sandbox.report.schedule import text as draw
from sandbox.report.words import size
from sandbox.verify.cases import DATA, EXPERTS, MODEL, TRAIN

__all__ = ["settled", "show"]


def settled(config: Config | None, engine: str, name: str) -> Config:
    """`config`, or a small one on 4 ranks, with the strategy of that name in it."""
    axis_name = find(engine, name).AXIS
    mesh: dict[str, Any] = {axis_name: {"degree": 4, "strategy": name}}
    model = MODEL
    if axis_name == "ep":  # carved out of dp, and wants experts
        mesh, model = {"dp": {"degree": 4}, **mesh}, EXPERTS
    config = config or Config(
        name=name, engine=engine, model=model, data=DATA, train=TRAIN, mesh=Mesh.model_validate(mesh)
    )
    axis = getattr(config.mesh, axis_name)
    if axis.degree > 1 and (axis.strategy or USUAL[axis_name]) == name:
        return config
    axis = type(axis).model_validate({"degree": max(2, axis.degree), "strategy": name})
    changed = config.mesh.model_copy(update={axis_name: axis}).model_dump()
    return config.model_copy(update={"engine": engine, "mesh": check(Mesh, changed, prefix="mesh")})


def show(console: Console, strategy: Strategy, name: str, config: Config) -> None:
    """Print the strategy's own account, its options, and what a rank sends and holds under `config`."""
    console.print(escape((strategy.__doc__ or "").strip()))
    options = Table(
        "option", "default", "", box=None, title="Options, beside degree and strategy", title_justify="left"
    )
    for key, field in strategy.Options.model_fields.items():
        options.add_row(key, str(field.default).lower(), field.description or "")
    if strategy.Options.model_fields:
        console.print()
        console.print(options)
    schedule = getattr(strategy, "schedule", None)
    if schedule:
        console.print()
        made = schedule(config, strategy.Options(**getattr(config.mesh, strategy.AXIS).options))
        console.print(draw(made, console.width), highlight=False)
    ranks = predict(config)
    parameters = sum(p.numel() for p in build(config.model, config.train.dtype).parameters())
    again = "" if config.train.recompute == "none" else f", {config.train.recompute} recomputation"
    table = Table("", *(f"rank {rank}" for rank in range(len(ranks))), box=None, title_justify="left")
    table.title = (
        f"{name} on {config.mesh.world} ranks ({config.mesh}): {parameters:,} parameters, {config.train.dtype}, "
        f"{config.train.optimizer}, {config.train.microbatches} microbatches{again}"
    )
    for key in ranks[0].traffic:
        table.add_row(f"sent a step, {key}", *(_sent(rank, key) for rank in ranks))
    for key in ranks[0].memory:
        table.add_row(f"held, {key}", *(size(rank.memory[key]) for rank in ranks))
    console.print()
    console.print(table)


def _sent(rank: Prediction, key: str) -> str:
    least, most = rank.least.get(key), size(rank.traffic.get(key, 0))
    return most if least is None or size(least) == most else f"{size(least)} to {most}"
