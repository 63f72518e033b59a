"""Cells that no column of a table tells apart: kept apart by their settings, and the newest only of the same ones."""

import json

import pytest
from analysis.frontier import of_experiment, settings, values
from analysis.reduce import points
from analysis.report_origin import union
from analysis.tables import TABLES
from analysis_rows import cell_rows, run, write
from conftest import checked_cell
from omegaconf import OmegaConf

from analysis import polykv_claims, published
from analysis.load import load
from polykv.results import COLUMNS, Store, cell_id


def measured(root, *overrides):
    module, settled = checked_cell("device=cpu", *overrides)
    config = OmegaConf.to_container(settled)
    return Store(root).write(settled.experiment_name, cell_id(config), config, module.run(settled))


def cell(root, config, experiment="quickstart", created_at="2026-01-02", value=1.0, **columns):
    """A cell's file with one row and a config of few settings."""
    base = {"model": {"name": "m"}, "document": {"name": "d"}, "recipe": {"name": "polykv"}}
    config = base | config | {group: base[group] | config.get(group, {}) for group in base}
    stamp = {"experiment": experiment, "cell": cell_id(config), "created_at": created_at}
    row = {"model": "m", "weights": "hub", "document": "d", "context_tokens": 512, "recipe": "polykv",
           "device": "cpu", "dtype": "float32", "n_agents": 3, "reader": "inject", "backend": "torch",
           "metric": "kl_mean", "protocol": "paper", "seed": 0, "unit": "nats", "value": value}  # fmt: skip
    path = Store(root).path(experiment, stamp["cell"])
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict.fromkeys(COLUMNS) | row | columns | stamp]
    path.write_text(json.dumps({"config": config, "provenance": {}, "rows": rows}))


def lines(root, column):
    return sorted(getattr(point, column) for point in points(load(root).rows))


def test_a_swept_codec_gives_a_line_each_and_the_verdict_of_the_recipe_itself(tmp_path):
    for bits in (3, 4, 2):
        measured(tmp_path, "experiment=polykv_ratio", "model=reference", "weights=random", "context=64",
                 f"recipe.value.bits={bits}")  # fmt: skip
    rows = load(tmp_path).rows
    figures = published.load("polykv")
    table = TABLES["polykv_ratio"](rows, figures)
    assert {line["recipe"]: round(line["nominal_ratio_low"].value, 3) for line in table.rows} == {
        "polykv": 2.909, "polykv+value.bits=2": 3.2, "polykv+value.bits=4": 2.667}  # fmt: skip
    ratio = polykv_claims.claims(rows)[0]
    assert "2.909" in ratio.markdown() and "3.2" not in ratio.markdown()
    only = tmp_path / "only"
    measured(only, "experiment=polykv_ratio", "model=reference", "weights=random", "context=64",
             "recipe.value.bits=4")  # fmt: skip
    assert "No ratio was measured" in polykv_claims.claims(load(only).rows)[0].markdown()


def test_two_texts_are_two_lines_also_where_their_files_bear_one_name(tmp_path):
    for place, digest in (("/a/t.txt", "0a"), ("/b/t.txt", "0b")):
        cell(tmp_path, {"document": {"path": place, "digest": digest}}, document="d t.txt")
    assert lines(tmp_path, "document") == ["d t.txt (digest=0a)", "d t.txt (digest=0b)"]


def test_a_rewritten_text_stands_beside_the_one_before(tmp_path):
    for digest in ("0a", "0b"):
        cell(tmp_path, {"document": {"path": "/a/t.txt", "digest": digest}})
    assert lines(tmp_path, "document") == ["d (digest=0a)", "d (digest=0b)"]


@pytest.mark.parametrize(
    ("one", "other", "column", "found"),
    [
        ({"max_new_tokens": 16}, {"max_new_tokens": 32}, "model",
         ["m (max_new_tokens=16)", "m (max_new_tokens=32)"]),
        ({"n_documents": 8, "prefix_fraction": 0.5}, {"n_documents": 9, "prefix_fraction": 0.7}, "model",
         ["m (n_documents=8, prefix_fraction=0.5)", "m (n_documents=9, prefix_fraction=0.7)"]),
        ({"model": {"threads": 2}}, {}, "model", ["m (threads=2)", "m (threads=unset)"]),
        ({"recipe": {"value": {"bits": 2}}}, {"recipe": {"value": {"bits": 3}}}, "recipe",
         ["polykv (value.bits=2)", "polykv (value.bits=3)"]),
    ],
)  # fmt: skip
def test_settings_without_a_column_keep_lines_apart(one, other, column, found, tmp_path):
    cell(tmp_path, one)
    cell(tmp_path, other)
    assert lines(tmp_path, column) == found


def test_the_newest_counts_of_the_same_settings_whatever_asked_for_them(tmp_path):
    cell(tmp_path, {"max_new_tokens": 16, "results_dir": "a"}, created_at="2026-01-01", value=1.0)
    again = {"max_new_tokens": 16, "results_dir": "b", "experiment_name": "polykv_quality"}
    cell(tmp_path, again, experiment="polykv_quality", created_at="2026-01-03", value=2.0)
    (point,) = points(load(tmp_path).rows)
    assert (point.model, point["kl_mean"].value) == ("m", 2.0)


def test_what_a_line_does_not_depend_on_keeps_nothing_apart(tmp_path):
    """Rows that leave the reader open, and cells that list other agents or quote other measurements."""
    for reader, digest in (("inject", "0a"), ("cascade", "0b")):
        config = {
            "reader": reader,
            "backend": reader,
            "measured_digest": digest,
            "agents": [digest],
        }
        cell(
            tmp_path,
            config,
            metric="compression_ratio",
            protocol="nominal",
            reader=None,
            backend=None,
        )
    assert lines(tmp_path, "model") == ["m"]


def test_every_cell_of_a_sweep_says_its_setting(tmp_path):
    """`full` stands beside the recipe that it is compared with, also where a cell of the sweep is missing."""
    for recipe, tokens in (("full", 16), ("polykv", 16), ("polykv", 32)):
        config = {"max_new_tokens": tokens, "recipe": {"name": recipe}}
        cell(tmp_path, config, recipe=recipe)
    assert lines(tmp_path, "model") == ["m (max_new_tokens=16)"] * 2 + ["m (max_new_tokens=32)"]


def test_backends_of_one_reader_are_lines_of_their_own(tmp_path):
    for backend in ("torch", "cpu"):
        cell(tmp_path, {"backend": backend}, backend=backend, reader="cascade")
    assert lines(tmp_path, "reader") == ["cascade (backend=cpu)", "cascade (backend=torch)"]


@pytest.mark.parametrize("columns", [{"reader": "cascade"}, {"backend": "cpu"}, {"device": "cuda"}])
def test_the_frontier_averages_over_seeds_only(tmp_path, columns):
    ((name, value),) = columns.items()
    cell(tmp_path, {}, experiment="recipe_frontier", value=1.0)
    cell(tmp_path, {"seed": 1}, experiment="recipe_frontier", value=2.0, seed=1)
    cell(tmp_path, {name: value}, experiment="recipe_frontier", value=9.0, **columns)
    found = {
        setting.model: values(mine)["kl_mean"].value
        for setting, mine in settings(of_experiment(load(tmp_path).rows, "recipe_frontier"))
    }
    before = {"reader": "inject", "backend": "torch", "device": "cpu"}[name]
    assert found == {f"m ({name}={before})": 1.5, f"m ({name}={value})": 9.0}


def test_agents_are_lines_of_agent_scaling_and_kept_apart_elsewhere(tmp_path):
    for n_agents in (1, 3):
        for experiment in ("agent_scaling", "context_scaling"):
            cell(tmp_path, {"n_agents": n_agents}, experiment=experiment, n_agents=n_agents)
    rows = load(tmp_path).rows
    assert set(of_experiment(rows, "agent_scaling")["model"]) == {"m"}
    assert set(of_experiment(rows, "context_scaling")["model"]) == {
        "m (n_agents=1)",
        "m (n_agents=3)",
    }


def test_cells_of_two_folders_are_kept_apart_on_one_page(tmp_path):
    for tokens in (16, 32):
        cell(tmp_path / str(tokens), {"max_new_tokens": tokens})
    found, _ = union([tmp_path / "16", tmp_path / "32"])
    assert set(found.rows["model"]) == {"m (max_new_tokens=16)", "m (max_new_tokens=32)"}


def test_policies_of_one_name_are_kept_apart_and_company_is_not(tmp_path):
    def timed(policies, value):
        cell(tmp_path, {"policies": policies}, experiment="handoff_ttft", metric="ttft", value=value,
             policy="topology", document=None, recipe=None)  # fmt: skip

    timed({"topology": {"alpha": 0.5}}, 1.0)
    timed({"topology": {"alpha": 0.5}, "uniform": {"alpha": 1.0}}, 2.0)
    assert set(load(tmp_path).rows["model"]) == {"m"}
    timed({"topology": {"alpha": 0.7}}, 3.0)
    assert {"m (policies.topology.alpha=0.7)"} < set(load(tmp_path).rows["model"])


def test_published_figures_meet_runs_that_are_told_apart_and_no_overridden_ones():
    assert published.same_model("llama-3-8b-instruct", "llama-3-8b (n_documents=8)")
    assert not published.same_model("llama-3-8b-instruct", "llama-3-8b+revision=main")


def test_hostile_settings_are_written_as_digests(tmp_path):
    deep = {}
    for _ in range(400):
        deep = {"a": deep}
    for odd in ("\ud800", "<script>\n"):
        cell(tmp_path, {odd: odd, "max_new_tokens": odd, "deep": deep})
    names = lines(tmp_path, "model")
    assert len(set(names)) == 2 and not any("<" in name or "\n" in name for name in names)


def test_an_old_cell_without_a_config_is_read(tmp_path):
    rows = cell_rows("reference", "reference", 512, 3, "polykv", True)
    again = [row | {"cell": "again", "created_at": "2027"} for row in rows]
    assert run(write(tmp_path, rows + again), "--only", "compare") == 0
    assert set(load(tmp_path).rows["model"]) == {"reference"}
