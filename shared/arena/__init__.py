"""The host's KV arena: files of slots on a tmpfs, which one process each writes and every process of the host reads."""
