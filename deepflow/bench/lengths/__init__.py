"""`deepflow bench lengths`: how well the length of an answer is predicted."""
