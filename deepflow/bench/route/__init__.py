"""`deepflow bench route`: where requests go, by every rule, in the simulator and on the platform itself."""
