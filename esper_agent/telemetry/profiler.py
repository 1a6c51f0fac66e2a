"""Profile of some iterations by `torch.profiler`, written into the run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.profiler


@contextlib.contextmanager
def profiling(
    directory: Path, iterations: int, with_stacks: bool = False, with_shapes: bool = False
) -> Iterator[Callable[[], None]]:
    """Profile iterations of the enclosed block, from the second one on.

    The first one compiles and allocates, so it says nothing of the others. The activities are those
    that torch supports here (CPU, CUDA, XPU, MPS). Open the trace with chrome://tracing or
    https://ui.perfetto.dev.

    Args:
        directory: Directory of the run; the trace is `profile/trace.json` in it.
        iterations: Number of iterations; 0 profiles nothing.
        with_stacks: Whether to record the Python stack of each operation.
        with_shapes: Whether to record the shapes of all inputs.

    Yields:
        Function to call after each iteration.
    """
    if iterations == 0:
        yield lambda: None
        return
    path = directory / "profile" / "trace.json"

    def write(profile: torch.profiler.profile) -> None:
        path.parent.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(path))

    with torch.profiler.profile(
        activities=torch.profiler.supported_activities(),  # type: ignore[no-untyped-call]
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=iterations, repeat=1),
        on_trace_ready=write,
        with_stack=with_stacks,
        record_shapes=with_shapes,
    ) as profile:
        yield profile.step
