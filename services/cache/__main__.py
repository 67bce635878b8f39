"""`python -m services.cache`: one replica of the directory."""

import os
import sys

from services.cache.service import main
from services.cache.settings import CacheSettings
from shared.config import ConfigError
from shared.service import run

if __name__ == "__main__":
    try:
        settings = CacheSettings.load(os.environ)
    except ConfigError as error:
        sys.stderr.write(f"deepflow cache: {error}\n")
        sys.exit(2)
    sys.exit(run("cache", settings, main))
