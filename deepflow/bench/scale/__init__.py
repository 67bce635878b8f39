"""`deepflow bench scale`: how fast Task Executors come up, what they take, and how well demand is followed."""
