"""A progress bar for long calls, where tqdm is installed."""

from __future__ import annotations

import sys


class Progress:
    """enabled: True, False, or None for a terminal and at least 32 items. Without tqdm there is no bar."""

    def __init__(self, total: int, unit: str, enabled: bool | None):
        self._bar = None
        delay = 0.0 if enabled else 1.0  # one that nobody asked for is shown for long calls only
        if enabled is None:
            enabled = total >= 32 and sys.stderr.isatty()
        if enabled:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, unit=unit.rstrip("s"), delay=delay)

    def add(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
