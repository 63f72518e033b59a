"""The reference model's fixed evaluation set, the same on every machine: documents with questions and word problems."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polykv.reference.documents import Document, Question, generate_document
from polykv.reference.problems import TEMPLATES, Operands, draw_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_DOCUMENTS = 500
QUESTIONS_PER_DOCUMENT = 4
PROBLEMS_PER_DOCUMENT = 2


@dataclass(frozen=True)
class Sheet:
    """A document with questions and problems; its prefix states all facts that they need."""

    document: Document
    questions: tuple[Question, ...]
    problems: tuple[Question, ...]


def sheets(
    tokenizer: "PreTrainedTokenizerBase", n_tokens: int, n_documents: int = N_DOCUMENTS
) -> Iterator[Sheet]:
    """The evaluation set's documents of one length, with their questions and problems."""
    for seed in range(n_documents):
        document = generate_document(
            tokenizer, n_tokens, seed, "heldout", n_questions=QUESTIONS_PER_DOCUMENT
        )
        rng, operands = random.Random(f"sheet/{n_tokens}/{seed}"), Operands(document.facts)
        fits = [
            template for template in TEMPLATES if operands.draw(rng, TEMPLATES[template].operands)
        ]
        problems: list[Any] = []
        for template in rng.sample(fits, len(fits)):
            problem = draw_problem(rng, operands, template)
            if problem and len(problems) < PROBLEMS_PER_DOCUMENT:
                problems.append(problem.ask())
        yield Sheet(document, tuple(document.questions), tuple(problems))
