"""How much memory a function needs at its worst moment, measured: what is allocated beyond what was there before.

Shapes say what a layer's inputs and outputs weigh. What it makes in between, and when it lets go of it, is up to the
implementation, and decides whether a size fits.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any], *, device: torch.device | str = "cpu") -> int:
    """Most bytes that torch holds at a time during ``function()``, beyond what it held at the start.

    On a CPU every allocation of torch's allocator counts, the scratch memory of its kernels included, as far as they take
    it from there (oneDNN, behind convolutions, keeps its own). The function is called once for a warm-up, so that what
    a first call keeps for ever does not count. Its result counts too. What was there before the call and is let go of within
    it is not credited: the profiler does not know the size of blocks that it has not seen coming.

    Args:
        function: takes no argument; what it returns is let go of.
        device: whose memory; on a CUDA device the caching allocator's own peak.

    Raises:
        ValueError: memory of another kind of device.

    >>> peak_bytes(lambda: torch.zeros(1000) + torch.ones(1000))  # two vectors of 4,000 bytes and their sum
    12000
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"peak_bytes measures cpu and cuda, got {str(device)!r}")
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's own library reports its phases on stderr, past Python; it reads this when it first runs.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
        del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return _highest(events)


def _highest(events: list[dict[str, Any]]) -> int:
    """The largest sum of changes so far, in the order in which they happened, of a chrome trace's memory events."""
    changes = [e["args"] for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    changes.sort(key=lambda args: args["Ev Idx"])
    return max(accumulate((int(args["Bytes"]) for args in changes), initial=0))
