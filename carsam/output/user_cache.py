"""Where carsam keeps, between its runs, what it can compute or ask for again."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "CARSAM_CACHE"


def cache_folder() -> Path:
    """``$CARSAM_CACHE``, or carsam's part of the user's cache folder."""
    import platformdirs

    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else platformdirs.user_cache_path("carsam")
