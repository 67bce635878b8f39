"""`deepflow heatmap`: which shapes of requests gain by prefill and decode on two TEs; measured, kept, drawn."""
