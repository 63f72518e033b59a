"""Damage by layer: errors of each layer and head, and the divergence if one layer alone is compressed."""

from collections.abc import Sequence

from omegaconf import DictConfig

from experiments import compare, settings
from experiments import rows as write
from experiments.session import Session
from experiments.study import Study
from polykv.evaluation import continuation, layers
from polykv.evaluation.continuation import score_rest
from polykv.evaluation.readings import Reading
from polykv.progress import track
from polykv.recipe import Recipe, load_recipe
from polykv.results import Rows

# part: key, value, logits or output; head: empty for a whole layer.
COLUMNS = {**write.SCORES, "layer": int, "head": int, "part": str}
FUSED = "the layer has no k_proj and v_proj of its own"
ZEROS = "the exact values are all zero, so there is no relative error"


def check(cfg: DictConfig, session: Session) -> None:
    """Check the settings and the documents."""
    settings.check_quality(cfg, session)
    settings.check_dequantizes(cfg)
    settings.check_keeps_all(cfg, f"experiment={cfg.study}")
    settings.check_full_attention(cfg)


def run(cfg: DictConfig, session: Session) -> Rows:
    """Metrics error, gaussian_error, dc_share, peak_to_rms, bias_norm, token_norm and kl of each layer."""
    rows = write.new_rows(cfg, session, COLUMNS)
    full, readings = session.full_readings(cfg), session.readings(cfg)
    recipe = Recipe.from_config(cfg.recipe)
    _add_errors(rows, full, readings)
    _add_theory(rows, recipe, full[0])
    _add_damage(rows, recipe, full)
    return rows


def _add_errors(rows: Rows, full: Sequence[Reading], readings: Sequence[Reading]) -> None:
    """The relative squared error of each part, by document, layer and head."""
    for sample, (exact, read) in enumerate(zip(full, readings, strict=True)):
        of_text = {"sample": sample, "text": exact.document.digest}
        queries = layers.queries_of(exact.model, exact.pool, exact.document.rest_BT)
        for layer, of_layer in enumerate(queries):
            pair = (one.pool.decode_layer(layer) for one in (exact, read))
            for part, by_head in layers.head_errors(of_layer, *pair).items():
                for head, value in enumerate(by_head.tolist()):
                    place = {"layer": layer, "head": head, "part": part}
                    rows.add("error", value, "relative", why=ZEROS, **of_text, **place)


def _add_theory(rows: Rows, recipe: Recipe, full: Reading) -> None:
    """The codecs' errors on Gaussian data, and how far the first document's cache is from Gaussian."""
    pool, biases = full.pool, layers.bias_norms(full.model)
    for layer in range(pool.n_layers):
        codecs = recipe.codecs(layer, pool.n_layers)
        sides = zip(("key", "value"), pool.decode_layer(layer), codecs, strict=True)
        for part, x_BHTD, codec in sides:
            place = {"layer": layer, "part": part}
            expected = layers.gaussian_error(codec, pool.head_dim)
            rows.add("gaussian_error", expected, "relative", **place)
            rows.add("bias_norm", biases[layer][part], "norm", why=FUSED, **place)
            rows.add("token_norm", layers.token_norm(x_BHTD), "norm", **place)
            for name, value in layers.diagnostics(x_BHTD).items():
                rows.add(name, value, "ratio", why=ZEROS, **place)


def _add_damage(rows: Rows, recipe: Recipe, full: Sequence[Reading]) -> None:
    """The divergence if one layer alone is compressed."""
    exact, texts = load_recipe("full"), [reading.document.digest for reading in full]
    for layer in track(range(full[0].pool.n_layers), "compressing one layer alone"):
        found = []
        for reading in full:
            pool, rest_BT = (
                layers.only_layer(reading.pool, recipe, exact, layer),
                reading.document.rest_BT,
            )
            log_probs_TV = score_rest(reading.model, pool.dequantize(), rest_BT)
            found.append(continuation.compare(reading.log_probs_TV, log_probs_TV, rest_BT))
        write.add_scores(rows, found, texts, ("kl",), layer=layer)


STUDY = Study(
    name="layer_sensitivity",
    title="Damage by layer",
    question="Which layers and heads does a recipe damage, and is its error the one that theory gives?",
    run=run,
    check=check,
    settle=compare.seeded,
    made_by=(*settings.SCORES, layers),
    settings=settings.POOL,
    columns=COLUMNS,
)
