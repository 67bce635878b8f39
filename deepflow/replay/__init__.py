"""`deepflow replay`: the requests of a trace at their own times, against a server or in the simulator."""
