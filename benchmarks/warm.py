"""Importing this module trains for a moment, so that processes forked from here start at once.

Compiled code and libraries that a training loads late are then in memory.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import torch

from benchmarks.kill_runs import small_training
from esper_agent import ppo_lstm

# A fork must not take place beside other threads.
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    ppo_lstm.train(small_training(Path(folder, "run")))
