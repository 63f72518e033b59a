"""Generated worlds of people, places, items, prices and dated events: facts with one value each.

Every sentence states its key (owner and attribute) before its value, so that a causal model can bind the value when it
reads it (unlike in "Ada has 14 apples"). The phrase between owner and value ("'s apples number") is one word of the
vocabulary: the whole key is then in the two tokens before the value, which a small model learns to bind much sooner.

Training and held-out worlds share no fact: a hash of (subject, attribute, value) assigns each fact to one of them, so
that no fact of a held-out document was seen in training.
"""

import random
import zlib
from dataclasses import dataclass

from polykv.reference import vocabulary as v

HELDOUT_SHARE = 4  # one fact in four is held out

FORMS = {  # kind: the words of the statement, the question
    "count": ("{subject}|'s {attribute} number|{value}|.", "How many {attribute} has {subject} ?"),
    "trait": ("{subject}|'s {attribute} is|{value}|.", "What is {subject} 's {attribute} ?"),
    "role": ("The {attribute} is|{value}|.", "Who is the {attribute} ?"),
    "price": ("The price of {attribute} is|{value}|.", "What is the price of {attribute} ?"),
    "event": ("The {attribute} starts|{value}|.", "When does the {attribute} start ?"),
}


@dataclass(frozen=True)
class Fact:
    """A statement with one value; `kind` is a key of FORMS, `subject` is empty for facts without an owner."""

    kind: str
    subject: str
    attribute: str
    value: str

    def statement(self) -> list[str]:
        """The words of the sentence that states the fact; the key phrase is one word."""
        key, value, dot = FORMS[self.kind][0].format(**vars(self)).rsplit("|", 2)
        owner = self.subject.split()
        return [*owner, key.split("|")[-1], *value.split(), dot]

    def question(self) -> list[str]:
        """The words of the question that the statement answers."""
        return FORMS[self.kind][1].format(**vars(self)).split()

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.subject, self.attribute

    @property
    def split(self) -> str:
        """The split that the fact belongs to, by a hash that is the same on every machine."""
        digest = zlib.crc32("|".join((*self.key, self.value)).encode())
        return "heldout" if digest % HELDOUT_SHARE == 0 else "train"


@dataclass(frozen=True)
class Difficulty:
    """Difficulty of a world.

    Attributes:
        facts_per_person: facts per owner.
        owners_per_item: average number of people with the same item (distractors of a count).
        namesakes: fraction of people who share their first name with another.
        unowned: fraction of facts about roles, prices and events.
    """

    facts_per_person: int = 4
    owners_per_item: int = 3
    namesakes: float = 0.0
    unowned: float = 0.2


DEFAULT = Difficulty()


def sample_world(
    rng: random.Random, n_facts: int, split: str, difficulty: Difficulty = DEFAULT
) -> list[Fact]:
    """Draw up to `n_facts` facts with different keys, in random order, all of one split."""
    n_unowned = round(difficulty.unowned * n_facts)
    n_people = max(2, round((n_facts - n_unowned) / difficulty.facts_per_person))
    people = _sample_people(rng, n_people, difficulty)
    items = rng.sample(v.ITEMS, min(len(v.ITEMS), max(2, n_people // difficulty.owners_per_item)))
    keys = _person_keys(rng, people, items, n_facts - n_unowned)
    keys += _unowned_keys(rng, items, n_unowned)
    rng.shuffle(keys)
    drawn = (_draw(rng, key, people, split) for key in keys)
    return [fact for fact in drawn if fact is not None]


def _sample_people(rng: random.Random, n: int, difficulty: Difficulty) -> list[str]:
    n_pairs = round(n * difficulty.namesakes / 2)
    first = rng.sample(v.NAMES, min(n - n_pairs, len(v.NAMES)))
    people = first[n_pairs:]
    for name in first[:n_pairs]:
        people += [f"{name} {surname}" for surname in rng.sample(v.SURNAMES, 2)]
    return people


def _attributes(rng: random.Random, items: list[str]) -> list[tuple[str, str]]:
    """All (kind, attribute) of a person in random order, with counts slightly favoured."""
    counts = [("count", item) for item in rng.sample(items, len(items))]
    traits = [("trait", trait) for trait in rng.sample(list(v.TRAITS), len(v.TRAITS))]
    order = []
    while counts or traits:
        take_count = counts and (not traits or rng.random() < 0.55)
        order.append((counts if take_count else traits).pop())
    return order


def _person_keys(
    rng: random.Random, people: list[str], items: list[str], n: int
) -> list[tuple[str, str, str]]:
    """Distribute `n` keys evenly among people."""
    hands = [_attributes(rng, items) for _ in people]
    keys: list[tuple[str, str, str]] = []
    for turn in range(max(map(len, hands))):
        for person, hand in zip(people, hands, strict=True):
            if len(keys) < n and turn < len(hand):
                kind, attribute = hand[turn]
                keys.append((kind, person, attribute))
    return keys


def _unowned_keys(rng: random.Random, items: list[str], n: int) -> list[tuple[str, str, str]]:
    pool = [("price", "", item) for item in items]
    pool += [("role", "", trade) for trade in rng.sample(v.TRADES, min(n, len(v.TRADES)))]
    pool += [("event", "", event) for event in rng.sample(v.EVENTS, min(n, len(v.EVENTS)))]
    return rng.sample(pool, min(n, len(pool)))


def _draw(
    rng: random.Random, key: tuple[str, str, str], people: list[str], split: str
) -> Fact | None:
    """Draw a fact of the split; None for a role that no person can have in this split."""
    kind, _, attribute = key
    if kind == "role":
        fits = [fact for p in people if (fact := Fact(*key, p)).split == split]
        return rng.choice(fits) if fits else None
    while True:
        if kind == "count":
            value = str(rng.choice(v.COUNTS))
        elif kind == "price":
            value = str(rng.choice(v.PRICES))
        elif kind == "trait":
            value = rng.choice(v.TRAITS[attribute])
        else:
            value = f"{rng.choice(v.MONTHS)} {rng.choice(v.DAYS)}"
        fact = Fact(*key, value)
        if fact.split == split:
            return fact
