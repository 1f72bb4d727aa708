"""A conversation of two turns with the `openai` package.

herd serve                        # in another terminal
python examples/openai_chat.py    # or: ... http://HOST:PORT/v1
"""

from __future__ import annotations

import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
model = next(iter(client.models.list())).id

messages: list[ChatCompletionMessageParam] = []
for question in ("What is the capital of France?", "Name one famous building there."):
    messages.append({"role": "user", "content": question})
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=60, temperature=0)
    text = answer.choices[0].message.content or ""
    messages.append({"role": "assistant", "content": text})
    print(f"> {question}\n{text}\n")
