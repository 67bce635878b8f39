"""Our engine against the engines people use instead, on this machine."""
