"""The frontend: OpenAI's HTTP API and the NATS front door, chat templates, tokenizers, and streams to clients."""
