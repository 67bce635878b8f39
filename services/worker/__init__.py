"""The worker: pod host, Task Executor and the FlowServe engine."""
