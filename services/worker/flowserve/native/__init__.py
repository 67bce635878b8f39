"""The sources of the native kernels, how they are built, and the library that came of it."""
