"""`python -m sandbox`, no step beyond the number in the file $GATE, and each $PACE s at least: so a test can strike."""

import os
import time
from pathlib import Path

from sandbox.cli import main
from sandbox.trainer import Step, Trainer

GATE, PACE, step = Path(os.environ["GATE"]), float(os.environ["PACE"]), Trainer.train_step


def paced(trainer: Trainer) -> Step:
    board = trainer.mesh.recorder.board
    while trainer.step >= int(GATE.read_text()):
        if board:
            board.alive()  # to stand at the gate is no hang
        time.sleep(0.01)
    time.sleep(PACE)
    return step(trainer)


if __name__ == "__main__":
    Trainer.train_step = paced  # type: ignore[method-assign]
    main()
