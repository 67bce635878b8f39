"""The cache service: who holds which KV pages. Soft state only; its loss costs time, never correctness."""
