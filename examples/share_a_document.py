"""Several agents read one document: its cache is compressed once, and all attend to that copy."""

import polykv
from polykv.reference.documents import generate_document, matches

N_AGENTS = 6


def main() -> None:
    model, tokenizer = polykv.load_model("reference")  # or the folder of a model of yours
    document = generate_document(tokenizer, 1024, seed=0)  # or any text of yours
    pool = polykv.SharedKVPool.from_text(
        model, tokenizer, document.text, polykv.load_recipe("polykv")
    )

    asked = document.questions[:N_AGENTS]
    prompts = [question.prompt for question in asked]
    answers = pool.ask(model, tokenizer, prompts, max_new_tokens=24, reader="in_place")
    for number, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        verdict = "right" if matches(answer, question.answer) else f"not {question.answer!r}"
        print(f"agent {number}:{question.prompt}{answer}   ({verdict})")

    unshared = N_AGENTS * pool.n_values * 2
    print(f"\n{pool.n_tokens} tokens, {N_AGENTS} agents")
    print(f"unshared fp16 caches: {unshared:>9,} bytes")
    print(f"one shared pool:     {pool.stored_bytes:>9,} bytes, all metadata counted")
    print(
        f"{pool.stored_ratio:.2f} times smaller an agent, {unshared / pool.stored_bytes:.1f} in all"
    )


if __name__ == "__main__":
    main()
