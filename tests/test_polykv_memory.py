"""PolyKV's tables and figures, and the arithmetic of the published gigabytes, on made-up rows."""

import re
from itertools import product

import matplotlib.pyplot as plt
import pytest
from analysis_rows import BYTES, RATIO, cell, compare_cell, paper_memory, quickstart, run, write
from conftest import checked_cell
from figure_checks import assert_readable, names_in
from pairwise import slow

from analysis import catalog, published
from analysis.load import load
from analysis.style import FEWEST
from experiments.polykv_memory import STUDY
from experiments.session import of_process
from polykv.config import load_group
from polykv.errors import PolyKVError
from polykv.geometry import Geometry
from polykv.models import load_config
from polykv.results import Store

GB_FIGURES = [f for f in published.load("polykv") if f.metric == "kv_memory"]
FIGURES = ("memory_agents", "perplexity_context", "bertscore_agents")
SMALL = {"n_documents": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    return load(write(root, quickstart(**SMALL) + paper_memory())).rows


def table(name, rows):
    return catalog.pieces("TABLES")[name](rows)


def figure(tmp_path, name, cells):
    """The figure of these cells (a Picture, or why there is none), and their rows."""
    rows = load(write(tmp_path, cells)).rows
    return catalog.pieces("FIGURES")[name](rows), rows


def measured(root, *overrides):
    """One cell of the study as a sweep measures and writes it; the rows of the folder."""
    study, settled = checked_cell("model=reference", "device=cpu", *overrides)
    rows = study.run(settled, of_process())
    Store(root).write(study.declaration(), study.identity(settled), {}, rows)
    return load(root).rows


def test_the_study_counts_what_the_geometry_says(tmp_path):
    rows = measured(
        tmp_path, "experiment=polykv_memory", "context=128", "n_agents=3", "resident=false"
    )
    assert set(rows["synthetic"]) == {True}
    by = rows.set_index(["metric", "accounting"])["value"]
    assert by["compression_ratio", "nominal"] == pytest.approx(32 / 11)
    geometry = Geometry.of(load_config(load_group("model", "reference")))
    fp32 = 4 * geometry.values_per_token * int(rows["n_tokens"].iloc[0]) / 1e9
    assert by["kv_memory", "paper"] == pytest.approx(fp32 / (32 / 11))
    assert by["kv_memory", "stored"] == pytest.approx(fp32 / 2 / by["compression_ratio", "stored"])
    assert ("kv_memory", "resident") not in by


@pytest.mark.slow
def test_the_preset_of_ratios_counts_no_memory_and_a_swept_codec_gives_a_line_each(tmp_path):
    for bits in (3, 4, 2):
        rows = measured(
            tmp_path, "experiment=polykv_ratio", "context=64", f"recipe.value.bits={bits}"
        )
    assert set(rows["metric"]) == {"compression_ratio"}
    assert {line["recipe"]: round(line["nominal_ratio_low"].value, 3) for line in table("polykv_ratio", rows).rows} == {
        "polykv": 2.909, "polykv+value.bits=2": 3.2, "polykv+value.bits=4": 2.667}  # fmt: skip


def test_a_length_is_needed_and_a_document_is_not():
    with pytest.raises(PolyKVError, match="context"):
        checked_cell("experiment=polykv_memory", "context=null")
    one, other = (checked_cell("experiment=polykv_ratio", "model=reference", f"document={name}")[1]
                  for name in ("generated", "moon_landing"))  # fmt: skip
    assert STUDY.identity(one) == STUDY.identity(other)


def test_published_gb_are_met_to_three_decimals_under_paper_accounting(rows):
    found = table("polykv_memory", rows)
    met = [row for row in found.rows if row["section"] == "published configurations"]
    assert len(met) == len(GB_FIGURES) == 10
    for row in met:
        assert round(row["paper"].value, 3) == row["published"].value
        assert abs(row["difference"].value) < 0.0005
        assert row["stored"].value < row["paper"].value
        assert row["resident"].value is None and "GB" in row["resident"].note
    for row in met:
        if row["recipe"] == "full":
            assert row["fp16"].value == pytest.approx(row["paper"].value / 2)


def test_the_published_gb_decompose_into_tokens_bytes_and_agents(rows):
    text = catalog.pieces("TEXTS")["polykv_memory_decomposition"](rows)
    assert "262,144 bytes per token" in text and "(stored, measured) 0.229 GB" in text
    lines = re.findall(r"\| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(lines) == 10 and all(computed == said for computed, said in lines)


def test_without_a_ratio_the_published_gb_imply_one(tmp_path):
    made = cell("polykv_memory", "a", model="llama-3-8b", weights="random", recipe="full")
    made[3].add("kv_memory", 1.0, "GB", accounting="paper", reader="unshared")
    text = catalog.pieces("TEXTS")["polykv_memory_decomposition"](load(write(tmp_path, [made])).rows)  # fmt: skip
    assert "2.907" in text and "(stored" not in text


def test_gigabytes_of_other_models_only_have_no_decomposition(tmp_path):
    rows = load(write(tmp_path, quickstart((256,), (3,), **SMALL))).rows
    assert catalog.pieces("TEXTS")["polykv_memory_decomposition"](rows) is None


@pytest.mark.slow
def test_another_model_stands_under_its_own_heading_and_is_not_subtracted(rows):
    found = table("polykv_quality", rows)
    heading = "published on llama-3-8b-instruct; measured on reference (reference weights)"
    mine = [row for row in found.rows if row["section"] == heading]
    assert len(mine) == 12
    assert all(row["difference"].value is None for row in mine)
    by_agents = {row["agents"]: row for row in mine if row["metric"] == "bertscore_f1"}
    assert by_agents[5]["measured"].value is None
    assert "minilm" in by_agents[3]["measured"].note


def test_the_same_model_is_matched_by_document_family_and_context(tmp_path, monkeypatch):
    monkeypatch.setitem(BYTES, "smollm2-1.7b", 393216)
    about = {"model": "smollm2-1.7b", "weights": "hub", "document": "moon_landing"}
    cells = [compare_cell(612, 3, recipe, **about) for recipe in ("full", "polykv")]
    found = table("polykv_quality", load(write(tmp_path, cells)).rows)
    mine = [row for row in found.rows if "smollm2" in row["section"]]
    assert {row["section"] for row in mine} == {
        "published on smollm2-1.7b-instruct; measured on it (hub weights)"
    }
    apollo = [row for row in mine if row["document"] == "apollo-11"]
    for row in apollo:
        assert (row["on"], row["at"]) == ("moon_landing", 612)
        expected = row["measured"].value - row["published"].value
        assert row["difference"].value == pytest.approx(expected)
    others = [row for row in found.rows if row not in apollo]
    assert others and all(row["measured"].value is None for row in others)


def test_random_weights_answer_no_quality_figure(tmp_path):
    assert table("polykv_quality", load(write(tmp_path, paper_memory())).rows) is None


def test_ratio_stands_per_recipe_and_head_dim(rows):
    by = {(row["recipe"], row["head_dim"]): row for row in table("polykv_ratio", rows).rows}
    assert set(by) == set(product(RATIO, (64, 128)))
    assert by["polykv", 128]["published"].value == 2.91
    assert by["polykv", 128]["nominal_ratio_low"].value == pytest.approx(32 / 11)
    assert by["full", 64]["published"].value is None


def test_cells_that_differ_in_a_setting_are_lines_of_their_own(tmp_path):
    cells = []
    for place, (name, value) in enumerate((("a", 1), ("b", 2))):
        one = compare_cell(256, 3, "polykv", name=name, delta=1.0 + place, **SMALL)
        cells.append((*one[:2], {"max_new_tokens": value}, one[3]))
    rows = load(write(tmp_path, cells)).rows
    assert {line["recipe"] for line in table("polykv_memory", rows).rows if line["section"] == "measured only"} == {
        "polykv (max_new_tokens=1)", "polykv (max_new_tokens=2)"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contexts", "recipes"),
    [
        ((512,), ("full",)),
        ((256, 512), ("full", "polykv")),
        *slow(
            ((512,), ("polykv",)),
            ((512,), ("full", "polykv")),
            ((256, 512), ("full",)),
            ((256, 512), ("polykv",)),
        ),
    ],
)
def test_figures_have_no_empty_panel_and_no_label_cut_off(tmp_path, contexts, recipes):
    cells = quickstart(contexts, (3,), recipes, **SMALL)
    rows = load(write(tmp_path, cells)).rows
    for name in FIGURES:
        found = catalog.pieces("FIGURES")[name](rows)
        if isinstance(found, str):
            assert recipes == ("full",), name
            continue
        assert_readable(found.canvas)


@pytest.mark.slow
def test_published_points_are_drawn_open_and_only_beside_their_own_model(tmp_path):
    cases = ((paper_memory(), 10), (quickstart((256,), (3,), **SMALL), 0))
    for cells, expected in cases:
        found, _ = figure(tmp_path / str(expected), "memory_agents", cells)
        lines = [line for ax in found.canvas.axes for line in ax.lines]
        drawn = [line for line in lines if line.get_fillstyle() == "none"]
        assert sum(len(line.get_xdata()) for line in drawn) == expected
        assert ("Open markers: published, on llama-3-8b-instruct." in found.caption) == bool(expected)  # fmt: skip
        plt.close(found.canvas)


@pytest.mark.parametrize("n_recipes", [2, 14])
@pytest.mark.slow
def test_a_legend_holds_many_recipes_and_long_names_inside_the_figure(tmp_path, n_recipes):
    suffix = "+exempt.first_layers=2+exempt.last_layers=2+exempt.recent=128+key.bits=8"
    grid = product(range(n_recipes), (256, 512), (3, 5))
    cells = [
        compare_cell(context, n, f"polykv_{place}{suffix}", n_documents=1)
        for place, context, n in grid
    ]  # fmt: skip
    rows = load(write(tmp_path, cells)).rows
    for name in FIGURES:
        found = catalog.pieces("FIGURES")[name](rows)
        assert len(names_in(found.canvas)) == n_recipes
        assert_readable(found.canvas)


def in_place(share=0.1):
    """A sweep, and beside it agents that read in place with a share of its resident memory."""
    cells = quickstart((600,), (3, 5), **SMALL)
    for n_agents, recipe in product((3, 5), ("polykv", "polykv_q8_0")):
        gb = share * int(600 * 0.7) * BYTES["reference"] / 2e9 * n_agents
        cells.append(compare_cell(600, n_agents, recipe, reader="in_place", resident=gb, **SMALL))
    return cells


def test_memory_is_on_one_scale_and_unit_for_all_accountings(tmp_path):
    found, rows = figure(tmp_path, "memory_agents", in_place())
    paper, stored, resident = found.canvas.axes
    assert paper.get_ylim() == stored.get_ylim() == resident.get_ylim()
    assert paper.get_ylabel() == "KV memory, MB"
    low, high = paper.get_ylim()
    assert sum(low <= number <= high for number in paper.get_yticks()) >= FEWEST
    for line in paper.lines:
        mine = rows[(rows["recipe"] == line.get_label()) & (rows["accounting"] == "paper")]
        values = mine.drop_duplicates("n_agents").sort_values("n_agents")["value"]
        assert list(line.get_ydata()) == pytest.approx(list(1e3 * values))
    plt.close(found.canvas)


def test_who_reads_in_place_has_a_line_of_its_own_where_memory_is_measured(tmp_path):
    found, _ = figure(tmp_path, "memory_agents", in_place())
    lines = {line.get_label(): line for line in found.canvas.axes[2].lines}
    recipes = ("polykv", "polykv_q8_0")
    assert set(lines) == {"full", *recipes, *(f"{recipe}, in place" for recipe in recipes)}
    pool, copies = lines["polykv, in place"], lines["polykv"]
    assert list(pool.get_ydata()) == pytest.approx([0.1 * y for y in copies.get_ydata()])
    assert pool.get_linestyle() == "--" and copies.get_linestyle() == "-"
    assert pool.get_color() == copies.get_color()
    assert {line.get_linestyle() for line in found.canvas.axes[0].lines} == {"-"}
    assert set(names_in(found.canvas)) == set(lines)
    assert "Dashed: " in found.caption and "polykv, in place" in found.caption
    plt.close(found.canvas)


def test_bertscore_is_drawn_only_where_a_score_differs(tmp_path):
    cells = [
        compare_cell(context, n, recipe, f1=1.0 if context == 256 else 0.9, **SMALL)
        for context, n, recipe in product((256, 512), (3, 15), ("full", "polykv"))
    ]
    found, _ = figure(tmp_path, "bertscore_agents", cells)
    (panel,) = found.canvas.axes
    assert "512 tokens" in panel.get_title(loc="left")
    assert "0.55" in panel.get_ylabel()
    plt.close(found.canvas)


@pytest.mark.parametrize("n_agents, is_drawn", [(2, False), (15, True)])
def test_an_interval_that_the_answers_cannot_support_is_not_drawn(tmp_path, n_agents, is_drawn):
    cells = [compare_cell(512, n_agents, "polykv", f1=0.9, n_documents=1)]
    found, _ = figure(tmp_path, "bertscore_agents", cells)
    (panel,) = found.canvas.axes
    reaches = [segment for part in panel.collections for segment in part.get_segments()]
    assert any(tuple(a) != tuple(b) for a, b in reaches) == is_drawn
    assert ("Error bars" in found.caption) == is_drawn
    plt.close(found.canvas)


@pytest.mark.slow
def test_every_table_and_figure_says_where_its_rows_come_from(rows):
    for name in ("polykv_memory", "polykv_ratio", "polykv_quality"):
        assert "(reference weights)" in table(name, rows).caption, name
    for name in FIGURES:
        found = catalog.pieces("FIGURES")[name](rows)
        assert "(reference weights)" in found.caption and "cpu, float32" in found.caption
        plt.close(found.canvas)


def test_tables_and_figures_are_written_in_every_format_and_why_one_is_not(tmp_path, capsys):
    cells = quickstart((256,), (3,), ("full",), **SMALL)
    assert run(write(tmp_path, cells), "--only", "polykv_memory,bertscore_agents,polykv_ratio") == 0
    written = {file.name for file in (tmp_path / "tables").iterdir()}
    names = product(("polykv_memory", "polykv_ratio"), ("md", "tex", "csv"))
    assert written == {f"{name}.{kind}" for name, kind in names}
    assert "bertscore_agents is not drawn" in capsys.readouterr().out
