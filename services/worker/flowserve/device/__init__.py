"""What differs between devices: one protocol and its implementations."""
