"""Getting models onto this machine: where they come from, how GGUF becomes safetensors, how a folder is published."""
