"""`deepflow bench autoscale`: how well the AUTOSCALER follows a load, and at what price."""
