"""`python -m services.scheduler`: one Job Executor."""

from __future__ import annotations

import sys

from services.scheduler import service
from services.scheduler.settings import SchedulerSettings
from shared.service import main

if __name__ == "__main__":
    sys.exit(main("scheduler", SchedulerSettings.load, service.main))
