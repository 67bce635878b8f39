"""What a person types or imports: the command line, the benches, and `from deepflow import LLM`."""
