"""A pool in a transformers pipeline, passed as `past_key_values=`.

The prompt is the whole text, whose first tokens the pool has cached. An uncompressed pool must give exactly the tokens
of a run without a pool; for compressed ones the identical answers are counted.
"""

import time

from transformers import TextGenerationPipeline, pipeline

import polykv
from polykv.reference.documents import generate_document

N_NEW = 24


def answer(pipe: TextGenerationPipeline, prompt: str, **cache: object) -> list[int]:
    """The new tokens of the prompt's greedy continuation."""
    options = {"max_new_tokens": N_NEW, "do_sample": False, "return_tensors": True}
    ids = pipe(prompt, **options, **cache)[0]["generated_token_ids"]
    return ids[len(pipe.tokenizer(prompt).input_ids) :]


def main() -> None:
    model, tokenizer = polykv.load_model("reference")
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    document = generate_document(tokenizer, 1024, seed=4)
    prompts = [document.text + question.prompt for question in document.questions[:6]]

    answer(pipe, prompts[0])  # to warm up
    start = time.perf_counter()
    unshared = [answer(pipe, prompt) for prompt in prompts]
    print(f"without a pool: {time.perf_counter() - start:.2f} s for {len(prompts)} prompts")
    for name in ("full", "polykv", "turboquant_2bit"):
        start = time.perf_counter()
        pool = polykv.SharedKVPool.from_text(
            model, tokenizer, document.text, polykv.load_recipe(name)
        )
        with polykv.attend_in_place(model):
            shared = [answer(pipe, prompt, past_key_values=pool.reader(1)) for prompt in prompts]
        seconds = time.perf_counter() - start
        same = sum(a == b for a, b in zip(shared, unshared, strict=True))
        print(
            f"{name:16} {pool.stored_bytes:>9,} bytes, {seconds:.2f} s, "
            f"{same} of {len(prompts)} answers identical token by token"
        )
        if name == "full" and same < len(prompts):
            raise SystemExit("an uncompressed pool changed an answer")
    print(f"the last of them:{tokenizer.decode(shared[-1])}")


if __name__ == "__main__":
    main()
