"""One script per engine, each run by the Python of that engine's own environment, over `runner.py`."""
