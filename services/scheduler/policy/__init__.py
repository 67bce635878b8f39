"""Which TE first: the paper's algorithm 1 as we close it, and the rules it is measured against."""
