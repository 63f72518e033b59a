"""The analysis's figures: nothing empty, cut off, overlapping or too small; the same bytes for the same rows."""

from itertools import combinations

import matplotlib.pyplot as plt
import pytest
from analysis.captions import caption
from analysis.colours import CONTRAST, colours, contrast, family, looks
from analysis.figures import FIGURES
from analysis.frontier_figures import FRONTIER_FIGURES
from analysis.handoff_figures import HANDOFF_FIGURES
from analysis.layout import COLUMN, FEWEST, PAGE, SIZE, plain_log
from analysis.reduce import points
from analysis_rows import handoff_rows, paper_memory, quickstart, write
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from test_frontier_analysis import asymmetry_rows, frontier_rows, layer_rows

from analysis import published, registry
from analysis.load import load


def legends_of(canvas):
    return [*canvas.legends, *(ax.get_legend() for ax in canvas.axes if ax.get_legend())]


def names_in(canvas):
    return [text.get_text() for legend in legends_of(canvas) for text in legend.get_texts()]


def bars_in(ax):
    """The ends of every interval of the panel that has a length."""
    found = [segment for part in ax.collections for segment in part.get_segments()]
    return [(tuple(a), tuple(b)) for a, b in found if tuple(a) != tuple(b)]


def in_place(rows, share=0.1):
    """Rows of `cascade` beside those of `inject`, with a share of their resident memory."""
    mine = [r for r in rows if r["reader"] == "inject" and r["protocol"] == "resident"]
    return [
        {**r, "reader": "cascade", "value": r["value"] * share, "cell": f"{r['cell']}-in-place"}
        for r in mine
    ]


def drawn(tmp_path, name, rows):
    """The figure of these rows, and the rows."""
    rows = load(write(tmp_path, rows)).rows
    return registry.FIGURES[name](rows), rows


def assert_readable(canvas):
    """No panel empty, no text cut off, none below 7 points, no two labels of a panel on each other."""
    canvas.draw_without_rendering()
    renderer = canvas.canvas.get_renderer()
    inches = canvas.dpi_scale_trans.inverted()
    width, height = canvas.get_size_inches()
    assert width in (COLUMN, PAGE)
    for ax in canvas.findobj(Axes):
        assert ax.lines or ax.patches or ax.images or ax.collections
        extent = ax.get_tightbbox(renderer).transformed(inches)
        assert extent.x0 >= 0 and extent.x1 <= width, ax.get_title()
        assert extent.y0 >= 0 and extent.y1 <= height, ax.get_title()
        boxes = [(t, Text.get_window_extent(t, renderer)) for t in ax.texts if t.get_text()]
        for (one, a), (other, b) in combinations(boxes, 2):
            across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(across, up) < 1, (one.get_text(), other.get_text())  # pixel
    texts = [text for text in canvas.findobj(Text) if text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) >= SIZE >= 7
    for text in texts:
        drawn = to_rgb(text.get_color())
        assert contrast(drawn) >= CONTRAST or drawn == (1, 1, 1), text.get_text()
    for legend in legends_of(canvas):
        box = legend.get_window_extent(renderer)
        extent = box.transformed(inches)
        assert extent.x0 >= 0 and extent.x1 <= width and extent.y0 >= 0 and extent.y1 <= height
        for ax in canvas.axes:  # beside the panels, never on their data
            assert not box.padded(-1).overlaps(ax.patch.get_window_extent(renderer))
    plt.close(canvas)


@pytest.mark.parametrize("contexts, agents", [((512,), (3,)), ((256, 512), (3,))])
@pytest.mark.parametrize("recipes", [("polykv",), ("full",), ("full", "polykv")])
def test_figures_have_no_empty_panel_and_no_label_cut_off(tmp_path, contexts, agents, recipes):
    found = points(load(write(tmp_path, quickstart(contexts, agents, recipes))).rows)
    for name, build in FIGURES.items():
        canvas = build(found, published.load("polykv"))
        if isinstance(canvas, str):
            assert recipes == ("full",) and "compressed recipe" in canvas, name
            continue
        assert_readable(canvas)


@pytest.mark.parametrize("name", sorted(HANDOFF_FIGURES))
def test_handoff_figures_are_readable(tmp_path, name):
    rows = load(write(tmp_path, handoff_rows())).rows
    assert_readable(HANDOFF_FIGURES[name](rows))


@pytest.mark.parametrize(
    "name", ["recipe_frontier", "recipe_ranking", "kv_asymmetry", "layer_sensitivity"]
)
def test_frontier_figures_are_readable(tmp_path, name):
    rows = [*frontier_rows(), *asymmetry_rows(), *layer_rows()]
    assert_readable(FRONTIER_FIGURES[name](load(write(tmp_path, rows)).rows))


def test_published_points_are_drawn_open_and_only_beside_their_own_model(tmp_path):
    figures = published.load("polykv")
    for rows, expected in ((paper_memory(), 10), (quickstart(), 0)):
        canvas = FIGURES["memory_agents"](
            points(load(write(tmp_path / str(expected), rows)).rows), figures
        )
        drawn = [line for ax in canvas.findobj(Axes) for line in ax.lines]
        open_ones = [line for line in drawn if line.get_fillstyle() == "none"]
        assert sum(len(line.get_xdata()) for line in open_ones) == expected
        plt.close(canvas)


@pytest.mark.parametrize("n_recipes", [2, 14])
def test_a_legend_holds_many_recipes_and_long_names_inside_the_figure(tmp_path, n_recipes):
    rows = []
    for place in range(n_recipes):
        name = f"polykv_{place}+exempt.first_layers=2+exempt.last_layers=2+exempt.recent=128+key.bits=8"
        mine = quickstart((256, 512), (3, 5), ("polykv",))
        rows += [{**r, "recipe": name, "cell": f"{r['cell']}-{place}"} for r in mine]
    for name in FIGURES:
        canvas, _ = drawn(tmp_path / name, name, rows)
        assert len(names_in(canvas)) == n_recipes
        assert_readable(canvas)


def test_each_recipe_has_a_colour_of_its_own_and_keeps_it():
    names = ["full", "fp16", "polykv", "polykv_q8_0", "turboquant_3bit", "turboquant_4bit", "q4_0"]
    found = colours(names)
    assert len(set(found.values())) == len(names)
    assert found["polykv"] == colours(["polykv"])["polykv"] == family("polykv")[1]


def test_every_figure_has_a_caption_with_where_its_rows_come_from(tmp_path):
    rows = load(write(tmp_path, quickstart() + paper_memory() + handoff_rows())).rows
    for name in registry.FIGURES:
        said = caption(name, rows)
        assert said.endswith("."), name
        if said.endswith("Nothing of this was run here."):
            continue
        for part in ("(reference weights)", "cpu, ", "commit 0123456789ab", "2026-01-02"):
            assert part in said, (name, part)
    assert "Open markers: published, on llama-3-8b-instruct." in caption("memory_agents", rows)
    assert "not drawn, but in table published_polykv" in caption("perplexity_context", rows)
    assert "n = 80" in caption("handoff_hops", rows)
    with pytest.raises(KeyError):
        caption("no_such_figure", rows)


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


def test_memory_is_on_one_scale_and_unit_for_all_accountings(tmp_path):
    rows = quickstart((600,), (3, 5))
    canvas, _ = drawn(tmp_path, "memory_agents", rows + in_place(rows))
    paper, stored, resident = canvas.axes
    assert paper.get_ylim() == stored.get_ylim() == resident.get_ylim()
    assert paper.get_ylabel() == "KV memory, MB"
    low, high = paper.get_ylim()
    assert sum(low <= number <= high for number in paper.get_yticks()) >= FEWEST
    in_mb = {
        line.get_label(): [1e3 * r["value"] for r in rows if r["recipe"] == line.get_label()
                           and r["protocol"] == "paper"] for line in paper.lines
    }  # fmt: skip
    for line in paper.lines:
        assert list(line.get_ydata()) == pytest.approx(in_mb[line.get_label()])
    plt.close(canvas)


def test_who_reads_in_place_has_a_line_of_its_own_where_memory_is_measured(tmp_path):
    rows = quickstart((600,), (3, 5))
    canvas, _ = drawn(tmp_path, "memory_agents", rows + in_place(rows))
    lines = {line.get_label(): line for line in canvas.axes[2].lines}
    assert set(lines) == {
        "full",
        *(f"{r}{how}" for r in ("polykv", "polykv_q8_0") for how in ("", ", in place")),
    }
    pool, copies = lines["polykv, in place"], lines["polykv"]
    assert list(pool.get_ydata()) == pytest.approx([0.1 * y for y in copies.get_ydata()])
    assert pool.get_linestyle() == "--" and copies.get_linestyle() == "-"
    assert pool.get_color() == copies.get_color()
    assert {line.get_linestyle() for line in canvas.axes[0].lines} == {"-"}
    assert set(names_in(canvas)) == set(lines)
    plt.close(canvas)


def test_bertscore_is_drawn_only_where_a_score_differs(tmp_path):
    rows = quickstart((256, 512), (3, 15))
    for row in rows:
        if row["metric"] == "bertscore_f1" and row["context_tokens"] == 256:
            row["value"] = 1.0
    canvas, _ = drawn(tmp_path / "some", "bertscore_agents", rows)
    (panel,) = canvas.axes
    assert "512 tokens" in panel.get_title(loc="left")
    plt.close(canvas)
    same = [{**row, "value": 1.0} if row["metric"] == "bertscore_f1" else row for row in rows]
    assert isinstance(drawn(tmp_path / "none", "bertscore_agents", same)[0], str)


@pytest.mark.parametrize(
    "n, low, is_drawn", [(3, -1.0, False), (100, -1.0, False), (3, 0.5, False), (100, 0.5, True)]
)
def test_an_interval_that_the_answers_cannot_support_is_not_drawn(tmp_path, n, low, is_drawn):
    rows = quickstart((512,), (3, 15), ("polykv",))
    for row in rows:
        if row["metric"] == "bertscore_f1":
            row.update(n=n, ci_low=low, ci_high=1.0)
    canvas, rows = drawn(tmp_path, "bertscore_agents", rows)
    (panel,) = canvas.axes
    assert bool(bars_in(panel)) == is_drawn
    assert ("Error bars" in caption("bertscore_agents", rows)) == is_drawn
    assert panel.get_ylim()[0] > (0.4 if is_drawn else 0.9)
    plt.close(canvas)


def test_the_fp16_relay_stands_beside_what_is_held_to_it(tmp_path):
    canvas, _ = drawn(tmp_path, "handoff_hops", handoff_rows(loss=8))
    kl, accuracy = canvas.axes
    lines = {c.get_label(): list(c[0].get_ydata()) for c in accuracy.containers}
    assert lines["fp16"] == lines["uniform"] == [90.0] * 3 and lines["topology"] == [80.0] * 3
    assert "fp16" not in {c.get_label() for c in kl.containers}  # it is what KL is to
    plt.close(canvas)


def test_one_context_has_bars_of_the_routes_and_no_empty_transport(tmp_path):
    rows = [r for r in handoff_rows() if r["context_tokens"] == 1024]
    canvas, rows = drawn(tmp_path, "handoff_ttft", rows)
    (panel,) = canvas.axes
    assert [bar.get_width() for bar in panel.patches] == pytest.approx([92.16, 10.24, 30.72])
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["reprefill", "fp16", "topology"] and panel.get_xlim()[0] == 0
    said = caption("handoff_ttft", rows)
    assert "Log" not in said and "Error bars: quartiles." in said and "file" not in said
    assert_readable(canvas)


@pytest.mark.parametrize("average", ["means", "medians"])
def test_stages_are_named_as_what_they_are_with_the_quartiles_of_the_total(tmp_path, average):
    rows = [r for r in handoff_rows() if r["experiment"] == "handoff_stages"]
    rows = [
        {**r, "note": f"{average[:-1]}; interval: quartiles"}
        for r in rows
        if r["policy"] == "topology"
    ]
    canvas, rows = drawn(tmp_path, "handoff_stages", rows)
    for ax, tokens in zip(canvas.axes, (1024, 8192), strict=True):
        total = 3.0 * tokens / 100
        parts = [bar.get_width() for bar in ax.patches]
        assert parts == pytest.approx([share * total for share in (0.1, 0.1, 0.1, 0.7)])
        assert list(ax.lines[0].get_xdata()) == pytest.approx([0.9 * total, 1.1 * total])
        assert ax.get_xlabel() == f"ms, {average}"
    assert f"{average} of the stages" in caption("handoff_stages", rows, canvas)
    plt.close(canvas)


def test_the_frontier_names_every_recipe_once_and_apart(tmp_path):
    canvas, rows = drawn(tmp_path, "recipe_frontier", frontier_rows())
    shown = rows[(rows["metric"] == "kl_mean") & (rows["value"] > 0)]["recipe"]
    assert sorted(names_in(canvas)) == sorted(set(shown))
    plt.close(canvas)
    found = looks(["turboquant_2bit", "turboquant_3bit", "uniform", "uniform_rotated", "q4_0"])
    assert len(set(found.values())) == 5
    assert found["uniform"][0] == found["uniform_rotated"][0] == family("uniform")[1]


def test_a_caption_names_the_lines_and_marks_that_are_drawn_and_no_others(tmp_path):
    rows = quickstart((600,), (3, 5))
    canvas, plain = drawn(tmp_path / "plain", "memory_agents", rows)
    said = caption("memory_agents", plain, canvas)
    assert "Lines: full; polykv; polykv_q8_0. " in said and "Dashed" not in said
    assert "Error bars" not in said and "Log y axis." in said
    with_pool = drawn(tmp_path / "pool", "memory_agents", rows + in_place(rows))[1]
    said = caption("memory_agents", with_pool)
    assert "polykv, in place; polykv_q8_0, in place. Dashed: the pool is read in place" in said
    only = [r for r in rows if r["protocol"] != "resident"]
    canvas, only = drawn(tmp_path / "only", "memory_agents", only)
    assert "resident" not in caption("memory_agents", only, canvas)
    plt.close("all")
