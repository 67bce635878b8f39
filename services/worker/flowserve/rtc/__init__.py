"""The Relational Tensor Cache of one Task Executor: who holds which block of KV, and which pages are where."""
