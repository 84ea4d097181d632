"""What a call runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.profiler import ProfilerActivity, profile


def events(call: Callable[[], None], words: Sequence[str]) -> list[str]:
    """Of a call's second run the names, in order, of our passes ("tkernels: ...") and of what has one of the words in
    its own. (The first compiles, which calls torch's own operators too.)"""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    names = [event.name for event in sorted(found.events(), key=lambda event: event.time_range.start)]
    return [name for name in names if name.startswith("tkernels: ") or any(word in name for word in words)]
