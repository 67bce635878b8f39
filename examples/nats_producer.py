"""A program that already speaks NATS sends a prompt on the bus and reads the answer as it is written.

python examples/nats_producer.py nats://USER:PASSWORD@127.0.0.1:PORT smollm2-135m "What is the capital of France?"

For a platform started by `deepflow up` see `instance.json` in DEEPFLOW_HOME: `nats_url`, and as USER and PASSWORD
`producer` and `producer_password`.
"""

import asyncio
import json
import re
import sys

import nats


async def main(url: str, model: str, question: str) -> None:
    client = await nats.connect(url)
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    # A model's name is one subject token: letters, digits, - and _ as they are, any other byte as =XX.
    token = re.sub(rb"[^\w-]", lambda byte: b"=%02X" % ord(byte[0]), model.encode()).decode()
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
