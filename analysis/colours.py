"""Which colour, marker and name stand for a recipe, policy or reader, alike in every figure."""

from collections.abc import Iterable, Sequence

from matplotlib.colors import to_hex, to_rgb

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
# What a figure calls a reader, and its colour.
READERS = {
    "private": ("unshared caches", BLACK),
    "inject": ("dequantize, as published", ORANGE),
    "cascade": ("in place", BLUE),
}
MARKERS = "osD^vPX*<>"
CONTRAST = 4.5  # to white, WCAG's least for text
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


def looks(recipes: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each recipe among many: its family's colour, and a marker of its own in the family."""
    members: dict[str, list[str]] = {}
    for recipe in recipes:
        members.setdefault(family(recipe)[0], []).append(recipe)
    return {
        recipe: (family(recipe)[1], MARKERS[place % len(MARKERS)])
        for mine in members.values()
        for place, recipe in enumerate(mine)
    }


def ink(tint: str) -> str:
    """The colour as text: as dark as reading on white needs, of the same hue."""
    shade = to_rgb(tint)
    while contrast(shade) < CONTRAST:
        shade = tuple(0.95 * part for part in shade)
    return to_hex(shade)


def contrast(shade: Sequence[float]) -> float:
    """To white, from 1 to 21 (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade[:3]]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 1.05 / (luminance + 0.05)
