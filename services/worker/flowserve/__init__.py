"""FlowServe: the inference engine. Runs inside a Task Executor, or alone as a library; knows no bus."""
