"""What this machine can run, and what is amiss: read from files and tools; no driver is loaded into this process."""
