"""`deepflow bench bus`: what the way through HTTP and bus costs over the bare engine, one module per question."""
