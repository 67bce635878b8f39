"""`bench rtc`: the index over KV, the arena, and DistFlow against memcpy and raw sockets."""
