"""The cache service: who holds which KV pages, and this host's own tiers. Its loss costs time, never correctness."""
