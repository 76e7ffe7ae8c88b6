"""All that a training needs to go on, in any layout: saved through torch's distributed checkpoint (DCP).

    step-000100/  *.distcp     tensors, in the boxes that the ranks held   parameters/NAME, optimizer/NAME/FIELD
                  .metadata    DCP's index: tensor -> boxes -> files
                  run.json     the step, and the config that was trained
                  SHA256SUMS   of all these files; written last, so a folder without it is no checkpoint

A tensor is stored by its logical name, and each box of it once, whoever held it. So it does not matter who saved: a
rank of any other plan, of any engine, reads what its own boxes overlap. The data's position is the step, and dropout
has no generator: nothing else is random.

    folder    a checkpoint on disk: whole or not there, and still what was written
    storage   pieces of logical tensors -> DCP's files -> other pieces
    state     a trainer's state as pieces
    together  work that every rank does, at its own pace, but not for ever
    watched   files that tell how much of them has been read or written
    saver     saving, perhaps while the training goes on
    resume    what must be the same to go on, and going on
    whole     a checkpoint as whole tensors, without the world that wrote it
    llama     the parameters under the names of Hugging Face's Llama, and back
"""

from sandbox.checkpoint.folder import find, latest, newest
from sandbox.checkpoint.resume import candidate, changes, check, restore, restore_newest
from sandbox.checkpoint.saver import Saver, save

__all__ = [
    "Saver", "candidate", "changes", "check", "find", "latest", "newest", "restore", "restore_newest", "save",
]  # fmt: skip
