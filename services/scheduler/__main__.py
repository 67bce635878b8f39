"""`python -m services.scheduler`: one Job Executor."""

import os
import sys

from services.scheduler.service import main
from services.scheduler.settings import SchedulerSettings
from shared.config import ConfigError
from shared.service import run

if __name__ == "__main__":
    try:
        settings = SchedulerSettings.load(os.environ)
    except ConfigError as error:
        sys.stderr.write(f"deepflow scheduler: {error}\n")
        sys.exit(2)
    sys.exit(run("scheduler", settings, main))
