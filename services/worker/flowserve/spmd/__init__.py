"""One model over several processes: rank 0 in the engine's own, the others its children, one per device."""
