"""A deterministic simulator of a deployment: virtual time, and the very code that decides in the one that ships."""
