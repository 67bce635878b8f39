"""`python -m services.worker`: run a pod host. Exit codes: 0 after a drain, 1 with a reason in the log, 2 if misset."""

from __future__ import annotations

import os
import sys

from services.worker.pod import open_pod
from services.worker.settings import WorkerSettings
from shared.config import ConfigError
from shared.service import run


def main() -> int:
    """Parse the environment and run until told to stop."""
    try:
        settings = WorkerSettings.load(os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - before there is a log
        return 2
    return run("pod", settings, open_pod)


if __name__ == "__main__":
    sys.exit(main())
