"""`python -m services.worker`: run a pod host."""

from __future__ import annotations

import sys

from services.worker.pod import open_pod
from services.worker.settings import WorkerSettings
from shared.service import main

if __name__ == "__main__":
    sys.exit(main("pod", WorkerSettings.load, open_pod))
