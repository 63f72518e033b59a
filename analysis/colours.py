"""Which colour and marker stand for a recipe or a policy, alike in every figure."""

from collections.abc import Iterable

from analysis.reduce import BASELINE

BLACK, ORANGE, BLUE, VERMILION = "#000000", "#E69F00", "#0072B2", "#D55E00"
GREEN, PINK, SKY, GREY = "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F"
# A family of recipes has one colour and one marker: the first prefix that fits.
FAMILIES = {
    BASELINE: ("uncompressed", BLACK, "o"),
    "polykv": ("PolyKV", VERMILION, "D"),
    "turboquant": ("TurboQuant", BLUE, "o"),
    "vllm": ("vLLM presets", PINK, "P"),
    "kivi": ("KIVI", GREEN, "^"),
    "uniform": ("absmax", ORANGE, "s"),
    "per_layer": ("absmax", ORANGE, "s"),
    "transformers": ("transformers' own", SKY, "*"),
    "q": ("ggml", BLACK, "v"),
    "": ("8-bit formats", GREY, "X"),
}
POLICIES = {
    "full": GREY,
    "reprefill": BLACK,
    "fp16": GREY,
    "uniform": ORANGE,
    "local": GREEN,
    "topology": VERMILION,
    "random": SKY,
    "sinks_recent": BLUE,
    "inverse": PINK,
}
SPARE = (ORANGE, SKY, GREEN, PINK, BLUE, VERMILION, GREY, BLACK)


def family(recipe: str) -> tuple[str, str, str]:
    """(name, colour, marker) of a recipe's family."""
    return next(f for prefix, f in FAMILIES.items() if recipe.startswith(prefix))


def colours(recipes: Iterable[str]) -> dict[str, str]:
    """Each recipe's colour among these: its family's, or where that is taken one that is left."""
    found: dict[str, str] = {}
    names = list(dict.fromkeys(recipes))
    for name in names:
        own = family(name)[1]
        reserved = {family(other)[1] for other in names}
        free = [own, *(c for c in SPARE if c not in reserved), *SPARE]
        found[name] = next((c for c in free if c not in found.values()), own)
    return found


def policy_colour(policy: str) -> str:
    return POLICIES.get(policy, BLACK)
