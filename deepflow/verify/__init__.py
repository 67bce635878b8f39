"""`deepflow verify`: shows on a real host that a device computes what the CPU computes, and says how fast."""
