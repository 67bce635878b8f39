"""`deepflow bench engine`: how fast FlowServe is, and how near to what the machine can do."""
