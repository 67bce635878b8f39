"""Text to tokens and back: tokenizers, chat templates, incremental detokenizer, stop strings. Pure: no bus, no HTTP."""
