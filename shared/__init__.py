"""The language of the platform: what every service must agree on to the bit. Imports no service, no torch, no HTTP."""
