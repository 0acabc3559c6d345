"""What a process that computes on the CPU is told about its memory.

glibc gives large blocks back to the kernel when they are freed and faults their pages in again, all
zeros, for the next ones; a model frees and asks for the same blocks with every pass.
"""

from __future__ import annotations

_KEPT_BYTES = 1 << 30

KEEP = {name: str(_KEPT_BYTES) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
"""Variables of the environment in which a process starts, by which it keeps blocks."""

KEEP_IN_THREADS = {**KEEP, "MALLOC_ARENA_MAX": "1"}
"""The same for a process that computes in another thread than its first: a thread's own arena holds
no block above 64 MB."""
