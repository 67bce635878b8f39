"""`python -m services.cache`: one replica of the directory."""

from __future__ import annotations

import sys

from services.cache import service
from services.cache.settings import CacheSettings
from shared.service import main

if __name__ == "__main__":
    sys.exit(main("cache", CacheSettings.load, service.main))
