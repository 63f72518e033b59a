"""A setting that nothing reads is refused by name; those that are declared, and a user's own, are taken."""

from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from pairwise import slow
from test_docs import typed_commands

from experiments import declared
from experiments.study import named, studies
from polykv import config
from polykv.errors import PolyKVError
from polykv.recipe import Recipe


@cache
def composed(*overrides):
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose("config", list(overrides))


def check(*overrides):
    declared.check(composed(*overrides))


@pytest.mark.parametrize(
    ("overrides", "named", "nearest"),
    [
        (["+contxt=512"], "contxt", "'context'"),
        (["+n_agent=3"], "n_agent", "'n_agents'"),
        (["+model.atn_implementation=eager"], "model.atn_implementation", "'model.attn_implementation'"),
        (["document=file", "document.path=a", "+document.question=b"], "document.question", "'document.questions'"),
        # What another of its group would read.
        (["document=moon_landing", "+document.path=/my/text.txt"], "document.path", ""),
        (["experiment=handoff_accuracy", "relay=gsm8k", "+relay.n_facts=3"], "relay.n_facts", ""),
        # What another study reads.
        (["experiment=polykv_quality", "+relay=gsm8k"], "relay", "handoff_accuracy"),
        (["experiment=polykv_quality", "+policy=topology"], "policy", "handoff_accuracy"),
        (["experiment=layer_sensitivity", "+answers=1"], "answers", "polykv_quality"),
        (["+budget_bits=3"], "budget_bits", "handoff_ttft"),
        (["experiment=handoff_ttft", "+card.keyfile=/a"], "card.keyfile", "'card.key_file'"),
        (["experiment=capacity", "+hardware.memory=3"], "hardware.memory", "'hardware.memory_gb'"),
        # What is settled, and not set.
        (["+versions.Int8=1"], "versions", ""),
    ],
)  # fmt: skip
def test_what_nothing_reads_is_refused_with_the_nearest_that_is_read(overrides, named, nearest):
    with pytest.raises(PolyKVError) as refused:
        check(*overrides)
    said = str(refused.value)
    assert named in said and nearest in said and "\n" not in said


def check_given(names, study):
    cfg = composed(f"experiment={study}")
    declared.check_given(names, f"{study}_preset", cfg, named(study).reads)


@pytest.mark.parametrize(
    ("study", "name", "nearest"),
    [
        ("handoff_accuracy", "max_new_tokens", "set relay.max_new_tokens"),
        ("handoff_accuracy", "recipe", "policy"),
        ("handoff_accuracy", "recipe.value.bits", "policy"),
        ("handoff_ttft", "scorer", "policies"),
        ("concurrency", "reader", "'readers'"),
        ("handoff_ttft", "reader", "'readers'"),
        ("concurrency", "document.path", "context"),
        ("capacity", "seed", "agents"),
    ],
)
def test_a_setting_of_every_config_is_refused_where_the_study_does_not_read_it(
    study, name, nearest
):
    with pytest.raises(PolyKVError) as refused:
        check_given([name], study)
    assert f"{study}_preset does not read {name};" in str(refused.value) and nearest in str(
        refused.value
    )


@pytest.mark.parametrize("study", slow(*studies()))
def test_what_sweeps_need_is_taken(study):
    names = ["experiment", "results_dir", "hydra.sweeper.max_jobs", "launcher", "logger", "device"]
    check_given([*names, "render", "weights", "model.path"], study)


@pytest.mark.parametrize(
    ("study", "name"),
    [("handoff_ttft", "n_agents"), ("handoff_ttft", "document.questions"),
     ("decode_drift", "reader"), ("handoff_accuracy", "reader"), ("handoff_accuracy", "policy.tiers"),
     ("concurrency", "repeats"), ("compare", "answers"), ("compare", "scorer")],
)  # fmt: skip
def test_what_a_study_has_of_its_own_or_only_checks_is_taken(study, name):
    check_given([name], study)


def test_a_recipe_has_no_other_settings():
    cfg = composed("recipe=polykv", "+recipe.exemtp.sinks=4")
    with pytest.raises(PolyKVError, match="'exempt'"):
        Recipe.from_config(cfg.recipe)


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"experiment={name}"] for name in config.available("experiment")),
        *slow(
            *([f"model={name}"] for name in config.available("model")),
            *([f"document={name}"] for name in config.available("document")),
            *([f"scorer={name}"] for name in config.available("scorer")),
            *(
                ["experiment=handoff_accuracy", f"relay={name}"]
                for name in config.available("relay")
            ),
            *(["experiment=capacity", f"hardware={name}"] for name in config.available("hardware")),
        ),
        ["logger=wandb"],
        ["+recipe.layer_bits=[[8,4]]", "+recipe.key.seed=3"],
        ["experiment=outside_references", "+references.mine={backend: quanto, nbits: 8}"],
        # A setting of a user's own that others are made of, and a document of a user's own code.
        ["+width=4", "recipe.value.bits=${width}"],
        ["document=file", "document._target_=my_texts.load", "document.path=a", "+document.mine=1"],
    ],
    ids=" ".join,
)
def test_what_is_declared_is_taken(overrides):
    check(*overrides)


@pytest.mark.parametrize("typed", typed_commands(), ids=" ".join)
@pytest.mark.slow
def test_every_command_of_the_readme_and_of_the_experiments_is_taken(typed):
    own = ("launcher=", "hydra.", "--", "recipe=polykv,mine")
    if "--help" not in typed:
        cfg = composed(*(one.partition(",")[0] for one in typed if not one.startswith(own)))
        declared.check(cfg)
        check_given([one.partition("=")[0].lstrip("+") for one in typed], cfg.study)
