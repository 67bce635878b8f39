"""The cluster manager: how many TEs of which model are to be up, and on which pod hosts."""
