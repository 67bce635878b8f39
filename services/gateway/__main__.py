"""`python -m services.gateway`: the frontend as a process, configured by `DEEPFLOW_*` variables."""

from __future__ import annotations

import os
import sys

from services.gateway.app import main
from services.gateway.settings import GatewaySettings
from shared.config import ConfigError
from shared.service import run

if __name__ == "__main__":
    try:
        settings = GatewaySettings.load(os.environ)
    except ConfigError as error:
        sys.stderr.write(f"deepflow gateway: {error}\n")
        sys.exit(2)
    sys.exit(run("gateway", settings, main))
