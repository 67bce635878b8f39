"""`python -m services.gateway`: the frontend as a process, configured by `DEEPFLOW_*` variables."""

from __future__ import annotations

import sys

from services.gateway import app
from services.gateway.settings import GatewaySettings
from shared.service import main

if __name__ == "__main__":
    sys.exit(main("gateway", GatewaySettings.load, app.main))
