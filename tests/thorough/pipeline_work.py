"""What launched ranks do in test_pipeline.py. Imports of pytest stay outside."""

from dataclasses import replace

from world import trainer_of

from sandbox.config import Config
from sandbox.runtime import Member
from sandbox.strategies.pipeline import Pipeline


def live(member: Member, config: Config) -> float:
    """The most microbatches that the rank kept activations of in a step; one of v stages counts 1/v."""
    trainer = trainer_of(member, config)
    most = 0
    forward = Pipeline._forward

    def count(self: Pipeline, *args: object, **options: object) -> None:
        nonlocal most
        forward(self, *args, **options)  # type: ignore[arg-type]
        most = max(most, len({*self._live, *self._later}))

    Pipeline._forward = count  # type: ignore[method-assign]
    trainer.train_step()
    pipeline = trainer.program.forward_backward.__self__  # type: ignore[attr-defined]
    assert not pipeline._live
    assert not pipeline._later
    return most / len(pipeline.schedule.held(member.rank))


def reports(member: Member, config: Config) -> list[tuple[str, int]]:
    """In a step: each gradient that was reported as complete, and how many actions of the rank were still to come."""
    trainer = trainer_of(member, config)
    inner, found = trainer.program.grad_ready, []
    pipeline = trainer.program.forward_backward.__self__  # type: ignore[attr-defined]
    done = [0]
    ask = pipeline.mail.ask

    def count(actions: object) -> None:
        done[0] += 1
        ask(actions)

    def note(name: str) -> None:
        found.append((name, len(pipeline.order) - done[0]))
        inner(name)

    pipeline.mail.ask = count
    trainer.program = replace(trainer.program, grad_ready=note)
    trainer.train_step()
    return found
