"""A strategy in words, and its formulas in bytes."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sandbox.config import Config, Mesh
from sandbox.model import build
from sandbox.plan import Strategy, predict
from sandbox.report.schedule import text as draw
from sandbox.report.words import size
from sandbox.verify.matrix import DATA, MODEL, TRAIN

__all__ = ["show"]


def show(console: Console, strategy: Strategy, engine: str, name: str, config: Config | None) -> None:
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
    config = config or Config(
        engine=engine, model=MODEL, data=DATA, train=TRAIN, mesh=Mesh.model_validate({strategy.AXIS: {"degree": 4}})
    )
    axis = getattr(config.mesh, strategy.AXIS)
    if axis.strategy != name:
        axis = type(axis).model_validate({"degree": max(2, axis.degree), "strategy": name})
        config = config.model_copy(
            update={"engine": engine, "mesh": config.mesh.model_copy(update={strategy.AXIS: axis})}
        )
    schedule = getattr(strategy, "schedule", None)
    if schedule:
        console.print()
        console.print(draw(schedule(config, strategy.Options(**axis.options)), console.width), highlight=False)
    model = build(config.model, config.train.dtype)
    ranks = predict(config)
    parameters = sum(p.numel() for p in model.parameters())
    again = "" if config.train.recompute == "none" else f", {config.train.recompute} recomputation"
    table = Table("", *(f"rank {rank}" for rank in range(len(ranks))), box=None, title_justify="left")
    table.title = (
        f"{name} on {config.mesh.world} ranks ({config.mesh}): {parameters:,} parameters, {config.train.dtype}, "
        f"{config.train.optimizer}, {config.train.microbatches} microbatches{again}"
    )
    for key in ranks[0].traffic:
        table.add_row(f"sent a step, {key}", *(size(rank.traffic.get(key, 0)) for rank in ranks))
    for key in ranks[0].memory:
        table.add_row(f"held, {key}", *(size(rank.memory[key]) for rank in ranks))
    console.print()
    console.print(table)
