# SPDX-License-Identifier: Apache-2.0
"""Ask a running `fullbeam serve` through the openai package: python examples/client.py [URL]"""

import sys

from openai import OpenAI

client = OpenAI(
    base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none"
)
model = client.models.list().data[0].id
answer = client.completions.create(
    model=model, prompt="def fibonacci(n):", max_tokens=32, temperature=0, n=2, seed=1
)
for choice in answer.choices:
    print(choice.index, choice.finish_reason, choice.text)
