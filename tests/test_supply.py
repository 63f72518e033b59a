"""What comes from a hub is pinned, is data and not code; and nothing here turns data into code.

Every Python file of the repository is read as a syntax tree, so that a new call cannot be forgotten.
"""

import ast
import json
import re
from pathlib import Path

import audit
import pytest

import polykv
from polykv import config
from polykv.errors import PolyKVError

PACKAGES = ("polykv", "experiments", "analysis", "hydra_plugins", "examples", "reference_model")
FILES = [config.REPO / "run.py", *(p for d in PACKAGES for p in (config.REPO / d).rglob("*.py"))]
FROM_HUB = ("load_dataset", "snapshot_download", "hf_hub_download")
NO_WEIGHTS = ("AutoConfig", "AutoTokenizer")
CODE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal")
COMMIT = re.compile("[0-9a-f]{40}")


def called(node: ast.Call) -> tuple[str, str]:
    """(what stands before the dot, the name that is called)."""
    if isinstance(node.func, ast.Attribute):
        return ast.unparse(node.func.value), node.func.attr
    return "", ast.unparse(node.func)


def constant(node: ast.Call, keyword: str):
    for given in node.keywords:
        if given.arg == keyword:
            return (
                given.value.value
                if isinstance(given.value, ast.Constant)
                else ast.unparse(given.value)
            )
    return None


def loads(node: ast.Call) -> str | None:
    """What is wrong with a call that loads from a hub or folder, if it is one."""
    before, name = called(node)
    arguments = [ast.unparse(argument) for argument in node.args]
    built = name == "from_config" and before.startswith("AutoModel")
    if (built or name == "from_pretrained") and constant(node, "trust_remote_code") is not False:
        return "trust_remote_code=False is missing"
    if name in ("from_pretrained", "_from_pretrained"):
        class_ = before if before.startswith("Auto") else (arguments or [""])[0]
        own = before == "auto"  # the one wrapper that passes on what it was given
        if class_ not in NO_WEIGHTS and not own and constant(node, "use_safetensors") is not True:
            return "use_safetensors=True is missing"
    if name in FROM_HUB and not constant(node, "revision"):
        return "revision= is missing"
    if name == "BERTScorer" and not (constant(node, "num_layers") and constant(node, "model_type")):
        return "bert-score pins nothing: give it a folder and num_layers"
    if (before, name) == ("evaluate", "load"):
        return "evaluate.load runs code from the hub"
    return None


def turns_data_into_code(node: ast.AST) -> str | None:
    """What is wrong with an import or a call that could run what it reads."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        found = [name for name in names if name.split(".")[0] in CODE_MODULES]
        return f"imports {found[0]}" if found else None
    if not isinstance(node, ast.Call):
        return None
    before, name = called(node)
    if not before and name in ("eval", "exec", "compile", "__import__"):
        return f"calls {name}"
    if (before, name) in {("os", "system"), ("os", "popen")} or constant(node, "shell"):
        return "runs a shell"
    if (before, name) == ("torch", "load") and constant(node, "weights_only") is not True:
        return "torch.load without weights_only=True"
    if before == "yaml" and name not in ("safe_load", "safe_dump"):
        return f"yaml.{name} makes objects"
    if name == "read_pickle" or constant(node, "allow_pickle"):
        return "reads a pickle"
    return None


def complaints(source: str, judge) -> list[tuple[int, str]]:
    nodes = [
        node
        for node in ast.walk(ast.parse(source))
        if judge is not loads or isinstance(node, ast.Call)
    ]
    return [(node.lineno, said) for node in nodes if (said := judge(node))]


@pytest.mark.slow
@pytest.mark.parametrize("judge", (loads, turns_data_into_code))
def test_no_file_of_the_repository_does_it(judge):
    assert len(FILES) > 60
    found = {
        str(file.relative_to(config.REPO)): said
        for file in FILES
        if (said := complaints(file.read_text(encoding="utf-8"), judge))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("judge", "source"),
    [
        (loads, "AutoTokenizer.from_pretrained(path)"),
        (loads, "AutoTokenizer.from_pretrained(path, trust_remote_code=True)"),
        (loads, "AutoModel.from_pretrained(path, trust_remote_code=False)"),
        (loads, "_from_pretrained(AutoModelForCausalLM, cfg)"),
        (loads, "AutoModelForCausalLM.from_config(config)"),
        (loads, "datasets.load_dataset('openai/gsm8k')"),
        (loads, "snapshot_download('FacebookAI/roberta-large')"),
        (loads, "BERTScorer(model_type='roberta-large')"),
        (loads, "evaluate.load('bertscore')"),
        (turns_data_into_code, "import pickle"),
        (turns_data_into_code, "from dill import loads"),
        (turns_data_into_code, "torch.load(path)"),
        (turns_data_into_code, "torch.load(path, weights_only=False)"),
        (turns_data_into_code, "eval(text)"),
        (turns_data_into_code, "yaml.load(text)"),
        (turns_data_into_code, "subprocess.run(text, shell=True)"),
        (turns_data_into_code, "np.load(path, allow_pickle=True)"),
        (turns_data_into_code, "os.system(text)"),
    ],
)
def test_the_judges_see_it(judge, source):
    assert complaints(source, judge)


def test_hub_models_and_data_are_pinned_to_a_commit():
    for name in config.available("model"):
        cfg = config.load_group("model", name)
        if cfg.trained_weights == "hub":
            assert COMMIT.fullmatch(cfg.revision), name
    assert COMMIT.fullmatch(config.load_group("document", "wikitext2_raw").revision)
    for name in ("scbench", "longbench"):
        url = config.load_group("document", name).url
        assert COMMIT.fullmatch(url.partition("@")[2].partition("/")[0])
    from polykv.evaluation import bertscore, gsm8k

    for module in (gsm8k, bertscore):
        assert COMMIT.fullmatch(module.REVISION)


def test_a_model_folder_that_brings_code_is_refused_and_the_code_not_run(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        if not file.name.endswith(".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    evil = settings | {"model_type": "evil", "auto_map": classes, "architectures": ["Model"]}
    (tmp_path / "config.json").write_text(json.dumps(evil))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(PolyKVError, match="cannot be loaded"):
        polykv.load_model(str(tmp_path), "cpu")
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_no_safetensors_are_refused(checkpoint, llama, tmp_path):
    import torch

    for file in checkpoint.iterdir():
        if not file.name.endswith(".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(llama.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(PolyKVError, match="cannot be loaded.*safetensors"):
        polykv.load_model(str(tmp_path), "cpu")


def test_every_pin_is_exact():
    lines = [
        line for line in audit.CONSTRAINTS.read_text().splitlines() if line[:1] not in ("", "#")
    ]
    assert len(lines) > 50 and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


PIN = {"name": "torch", "version": "2.13.0", "vulns": []}
HOLE = {"id": "PYSEC-2026-1", "fix_versions": ["2.13.1"]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI: torch (2.13.0)"}


@pytest.mark.parametrize(
    ("answers", "status", "said"),
    [
        ([[PIN]], 0, "1 pins audited, 0 not, 0 advisories"),
        ([None, [PIN]], 0, "pypi.org: 1 pins audited"),
        ([[PIN | {"vulns": [HOLE]}]], 1, "torch 2.13.0: PYSEC-2026-1, fixed in 2.13.1"),
        ([[PIN, UNKNOWN]], 1, "1 pins audited, 1 not"),
        ([None, [UNKNOWN]], 2, "nothing was audited, no advisory service answered"),
    ],
)
def test_an_audit_that_nobody_answered_is_not_a_clean_one(
    answers, status, said, monkeypatch, capsys
):
    left = iter(answers)

    def ran(command, **options):
        pins = next(left)
        output = json.dumps({"dependencies": pins}) if pins else ""
        return type(
            "Done", (), {"stdout": output, "stderr": "NameResolutionError", "returncode": 1}
        )

    monkeypatch.setattr(audit.subprocess, "run", ran)
    assert audit.main() == status
    assert said in "".join(capsys.readouterr())


def test_a_file_of_ours_that_is_gone_would_be_noticed():
    assert {Path(file).name for file in FILES} >= {
        "models.py",
        "bertscore.py",
        "gsm8k.py",
        "card.py",
    }
