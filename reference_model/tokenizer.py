"""The reference model's tokenizer: one token per word of the generator, saved for AutoTokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING

from polykv.reference import vocabulary as v
from polykv.reference.problems import TEMPLATES, TURNS
from polykv.reference.text import WORD
from polykv.reference.world import FORMS, Fact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FUNCTION_WORDS = ("Q:", "A:", "'s", ".", ",", "?", "and", "so", *"+-*/=", "####")


def vocabulary() -> dict[str, int]:
    """Every word with its id: specials, the words of all templates, then all values."""
    categories = (
        v.NUMBERS,
        v.NAMES,
        v.SURNAMES,
        v.PLACES,
        v.ITEMS,
        v.ANIMALS,
        v.DRINKS,
        v.INSTRUMENTS,
        v.COLOURS,
        v.DISHES,
        v.TRADES,
        v.EVENTS,
        v.MONTHS,
        tuple(v.TRAITS),
    )
    questions = [question for _, question in FORMS.values()]
    questions += [template.question for template in TEMPLATES.values()]
    asked = " ".join([*questions, *TURNS.values()]).split()
    words = [*v.SPECIALS, *FUNCTION_WORDS]
    words += sorted({word for word in asked if not word.startswith("{")})
    words += [Fact(kind, "", attribute, "").statement()[0] for kind, attribute in _keys()]
    words += [word for category in categories for word in category]
    return {word: i for i, word in enumerate(dict.fromkeys(words))}


def _keys() -> list[tuple[str, str]]:
    owned = [("count", item) for item in v.ITEMS] + [("trait", trait) for trait in v.TRAITS]
    unowned = {"price": v.ITEMS, "role": v.TRADES, "event": v.EVENTS}
    return owned + [(kind, name) for kind, names in unowned.items() for name in names]


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """A `PreTrainedTokenizerFast` over `vocabulary()`; words outside it become `<unk>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocabulary(), unk_token=v.UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    # For its spacing before punctuation; no word begins with this prefix (with "##", "####" would).
    core.decoder = decoders.WordPiece(prefix="\u2581\u2581", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=v.UNKNOWN,
        pad_token=v.PAD,
        eos_token=v.END_OF_TURN,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        padding_side="left",
    )


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer files into `folder`."""
    build_tokenizer().save_pretrained(folder)
