"""`deepflow bench`: every performance claim as a command that anybody can run again."""
