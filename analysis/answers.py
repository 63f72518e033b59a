"""What agents said, for reading: a Markdown file per text and setting, each question with all recipes' answers."""

from pathlib import Path

from analysis.load import Results
from analysis.statistics import BASELINE

SETTING = ["model", "document", "context_tokens", "n_agents", "reader"]


def write(results: Results, folder: Path) -> None:
    """One file in `folder` for each setting of which cells hold answers.

    Raises:
        OSError: it cannot be written.
    """
    rows = results.rows[results.rows["recipe"] != BASELINE]
    firsts = rows[rows["metric"] == "bertscore_f1"].drop_duplicates(["study", "cell"])
    for key, part in firsts.sort_values("created_at").groupby(SETTING, sort=False):
        by_recipe = {
            recipe: results.cells[study, cell].answers
            for recipe, study, cell in zip(part["recipe"], part["study"], part["cell"], strict=True)
        }
        folder.mkdir(parents=True, exist_ok=True)
        named = dict(zip(SETTING, key, strict=True))
        name = "-".join(f"{_plain(value)}" for value in named.values())
        name = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
        (folder / f"{name}.md").write_text(_page(named, by_recipe), encoding="utf-8")


def _page(named: dict, by_recipe: dict[str, list[dict]]) -> str:
    about = ", ".join(f"{name} {_plain(value)}" for name, value in named.items())
    parts = [f"# Answers: {about}"]
    first = next(iter(by_recipe.values()))
    for place, asked in enumerate(first):
        parts.append(
            f"## Document {asked['document']}, agent {asked['agent']}: {asked['question']}"
        )
        lines = [("right answer", asked["gold"]), ("uncompressed", asked["reference"])]
        lines += [
            (recipe, said[place]["answer"])
            for recipe, said in by_recipe.items()
            if place < len(said)
        ]
        parts.append(
            "\n".join(f"- **{who}**: {_one_line(said)}" for who, said in lines if said is not None)
        )
    return "\n\n".join(parts) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(empty)"


def _plain(value: object) -> object:
    return f"{value:.0f}" if isinstance(value, float) else value
