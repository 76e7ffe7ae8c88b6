"""DeepSpeed, imported without a word: it asks on import what it runs on, and would warn that it is the CPU."""

import os

import torch

if not torch.cuda.device_count():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

__all__ = ["deepspeed"]

deepspeed.utils.logger.setLevel("ERROR")
