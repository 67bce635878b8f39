"""`deepflow bench conversation`: a conversation whose Task Executor is killed, on one host and across two."""
