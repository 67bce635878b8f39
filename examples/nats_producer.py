"""A program that already speaks NATS sends a prompt on the bus and reads the answer as it is written.

python examples/nats_producer.py nats://127.0.0.1:4222 smollm2-135m "What is the capital of France?"
"""

import asyncio
import json
import sys

import nats


async def main(url: str, model: str, question: str) -> None:
    client = await nats.connect(url)
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    # A model's name is one subject token: letters, digits, - and _ as they are, any other byte as =XX.
    token = "".join(c if c.isalnum() or c in "-_" else f"={ord(c):02X}" for c in model)
    body = {"messages": [{"role": "user", "content": question}], "stream": True}
    await client.publish(f"deepflow.v1.prompt.{token}", json.dumps(body).encode(), reply=inbox)
    while (message := await answers.next_msg(timeout=60)).data:  # an empty message is the last
        chunk = json.loads(message.data)
        if "error" in chunk:
            raise SystemExit(chunk["error"]["message"])
        print(chunk["choices"][0]["delta"].get("content", ""), end="", flush=True)  # noqa: T201
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
