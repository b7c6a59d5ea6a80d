"""Several texts at a time on an event loop: the engine computes them together, and prints each as it comes."""

import asyncio

import pymla


async def tell(engine, prompt):
    text = "".join([piece async for piece in engine.generate(prompt, max_tokens=24, temperature=0)])
    print(repr(prompt + text))


async def main():
    with pymla.load(ctx=256, cache_tokens=2048) as model:
        prompts = ["def __init__(self", "import os\n", "class Error(", "for i in range("]
        await asyncio.gather(*(tell(model.engine, prompt) for prompt in prompts))


asyncio.run(main())
