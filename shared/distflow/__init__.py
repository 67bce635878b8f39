"""DistFlow: bytes between instances by the shortest path there is (the paper, section 4), knowing no blocks."""
