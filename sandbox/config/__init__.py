"""A run as data: what is trained, on what, how, and on which mesh. Checked before anything starts.

A config is a YAML file of five sections (`mesh`, `model`, `data`, `train`, and `run` for where and how long), a `name`
and an `engine`. What is left out has a default. Unknown keys are refused with the nearest right name.
"""

from sandbox.config.base import Options, brief, that_do
from sandbox.config.mesh import AXES, Axis, DataAxis, Mesh
from sandbox.config.reading import check, load
from sandbox.config.sections import Config, Data, Model, Run, Train

__all__ = [
    "AXES",
    "Axis",
    "Config",
    "Data",
    "DataAxis",
    "Mesh",
    "Model",
    "Options",
    "Run",
    "Train",
    "brief",
    "check",
    "load",
    "that_do",
]
