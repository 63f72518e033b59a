"""`make docs`: the API by pdoc, and pages for the README, the examples, the model families and every study.

`python docs/build.py [FOLDER]` replaces the folder, site/ by default.
"""

import pkgutil
import shutil
import sys
from pathlib import Path

import pages
import pdoc
from pdoc.render_helpers import to_html

import polykv
from experiments.study import studies

# Not documented: the reference model, the Triton kernels, and what needs an extra that may not be installed.
LEFT_OUT = ("!polykv.reference", r"!polykv\.kernels\.triton.*", r"!polykv\.lm_eval.*")


def main(site: Path) -> None:
    """Write the whole site."""
    shutil.rmtree(site, ignore_errors=True)
    write_api(site)
    folders = pages.committed()
    texts = {
        f"studies/{name}": pages.study(study, folders, site / "figures")
        for name, study in studies().items()
    }
    texts |= {"index": pages.overview(), "examples": pages.examples(), "families": pages.families()}
    template = pdoc.render.env.get_template("page.html.jinja2")
    for page, text in texts.items():
        path = site / f"{page}.html"
        path.parent.mkdir(exist_ok=True)
        html = template.render(title=path.stem, body=to_html(text), root="../" * page.count("/"))
        path.write_text(html, encoding="utf-8")
    print(f"documentation: {site / 'index.html'}")


def write_api(site: Path) -> None:
    """A page for every module of polykv."""
    pdoc.render.configure(docformat="google", template_directory=pages.REPO / "docs" / "templates")
    pdoc.render.env.globals["study_names"] = sorted(studies())
    for name in polykv.__all__:  # load the lazy names, which pdoc does not
        setattr(polykv, name, getattr(polykv, name))
    modules = [module.name for module in pkgutil.iter_modules(polykv.__path__, "polykv.")]
    pdoc.pdoc("polykv", *modules, *LEFT_OUT, output_directory=site)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else pages.REPO / "site")
