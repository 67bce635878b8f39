"""How DeepFlow is set up on a machine: the bus's configuration, and what a compose start needs first."""
