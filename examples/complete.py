# SPDX-License-Identifier: Apache-2.0
"""Complete a prompt with the default model, whole and as a stream."""

import fullbeam

with fullbeam.load() as model:
    result = model.complete("def fibonacci(n):", max_tokens=48, temperature=0)
    print(result.choices[0].text)
    print(result.usage)

    for piece in model.stream("The capital of France is", max_tokens=16, temperature=0):
        print(piece.text, end="", flush=True)
    print()
