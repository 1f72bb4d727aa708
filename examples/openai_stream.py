"""An answer shown while it is written, with the `openai` package; leaving the loop early would stop the model too.

herd serve                          # in another terminal
python examples/openai_stream.py    # or: ... http://HOST:PORT/v1
"""

from __future__ import annotations

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
model = next(iter(client.models.list())).id

with client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Tell me a very short story about a sheep."}],
    max_tokens=120,
    temperature=0.7,
    seed=7,  # the same seed gives the same story
    stream=True,
    stream_options={"include_usage": True},
) as stream:
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n[{chunk.usage.completion_tokens} tokens]")
