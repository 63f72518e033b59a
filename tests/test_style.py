"""Colours of recipes and axes of figures."""

import matplotlib.pyplot as plt
from hypothesis import example, given, settings
from hypothesis import strategies as st

from analysis.style import FEWEST, STYLE, family, looks, plain_log, sheet
from polykv.config import available


def test_each_recipe_has_a_colour_and_a_marker_of_its_own_and_keeps_them():
    known = available("recipe")
    own = [*known, "q8_0+value.bits=4", "mine", "k8v4", "k4v8"]
    found = looks(own)
    assert len(set(found.values())) == len(own)
    for name in known:
        assert looks([name]) == {name: found[name]}
    _, tint, marker = family("polykv")
    assert found["polykv"] == (tint.lower(), marker)


@given(st.floats(1e-5, 1e3), st.floats(1.1, 1e5))
@example(551.0, 1.25)
@settings(max_examples=60, deadline=None)
def test_a_log_axis_has_numbers_enough_to_be_read_as_one(low, ratio):
    canvas, ax = plt.subplots()
    plain_log(ax)
    ax.set_ylim(low, low * ratio)
    numbers = ax.yaxis.get_majorticklocs()
    shown = [number for number in numbers if low <= number <= low * ratio]
    assert len(shown) >= FEWEST - 1  # two could be of any axis
    assert len(shown) <= 10 and len(set(ax.yaxis.get_major_formatter().format_ticks(shown))) == len(
        shown
    )
    decades = sum(low <= 10.0**n <= low * ratio for n in range(-6, 10))
    assert len(ax.yaxis.get_minorticklocs()) >= 8 * (decades - 1)
    plt.close(canvas)


def test_a_long_heading_is_broken_inside_the_canvas():
    words = (
        "qwen2.5-coder-0.5b (gguf:Q4_K_M@1d9614638d18 weights), MMMM agents, reader in_place; " * 4
    )
    with plt.style.context(STYLE):
        canvas, _ = sheet([words.strip(), "short"], 1, 2.0)
        canvas.draw_without_rendering()
        long, short = (part._suptitle.get_window_extent() for part in canvas.subfigs)
    assert long.x1 <= canvas.bbox.x1 and long.y1 <= canvas.bbox.y1
    assert short.x1 < long.x1
    plt.close(canvas)
