"""The `deepflow` command, one module per noun; heavy imports happen in the command that needs them."""
