"""OpenAI's wire format, both directions: bodies read with checks, answers and stream chunks written."""
