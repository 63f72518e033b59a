"""Where the damage is: errors by layer and head beside theory, and each layer's own damage."""

from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from analysis import style
from analysis.frontier import about, by_setting
from analysis.render import Column, Table, fixed, keys, significant
from analysis.statistics import QUALITY, Measure, Value, plain_mean

PARTS = ("key", "value", "logits", "output")
SIDES = ("key", "value")
MEASURES = {
    "layer_kl": QUALITY["kl_mean"],
    **{f"error_{part}": Measure("error", {"part": part}, plain_mean) for part in PARTS},
    **{
        f"{name}_{part}": Measure(name, {"part": part})
        for name in ("gaussian_error", "dc_share", "peak_to_rms", "bias_norm", "token_norm")
        for part in SIDES
    },
}


def table(rows: pd.DataFrame) -> Table | None:
    """Errors by layer beside those on Gaussian data, and the KL when one layer alone is compressed."""
    columns = [
        Column("layer_kl", "KL, this layer alone [95 %]", significant, interval=True),
        *(Column(f"error_{part}", f"{part} error", significant) for part in PARTS),
        *(Column(f"gaussian_error_{part}", f"{part}, Gaussian", significant) for part in SIDES),
        *(Column(f"dc_share_{part}", f"{part} DC share", fixed(3)) for part in SIDES),
        *(Column(f"peak_to_rms_{part}", f"{part} peak channel", fixed(2)) for part in SIDES),
        *(Column(f"bias_norm_{part}", f"{part} bias norm", fixed(1)) for part in SIDES),
        *(Column(f"token_norm_{part}", f"{part} norm", fixed(1)) for part in SIDES),
    ]
    lines = [
        {"section": setting, "recipe": recipe, "layer": int(layer)}
        | {column.name: measured(part, column.name) for column in columns}
        for setting, mine in by_setting(rows)
        for (recipe, layer), part in mine.groupby(["recipe", "layer"])
    ]
    caption = (
        "Relative squared errors of each layer (mean of its heads and documents), beside the same codec's error on "
        "Gaussian data. DC share: energy in each vector's mean, which an unsigned Hadamard transform gathers in one "
        "coordinate (1 / head_dim for white noise). Peak channel: its root mean square over the head's (1 for white "
        "noise). Bias norm: of the projection's bias, and norm: root mean square of a token's vector, all kv heads "
        f"together. {about(rows)}"
    )
    return Table("layer_sensitivity", caption, [*keys("recipe", "layer"), *columns], lines)


def measured(rows: pd.DataFrame, name: str) -> Value:
    """A figure of one recipe and layer, over the documents of all its seeds."""
    return MEASURES[name].of(rows, ["seed"])


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Findings for each setting: which layers a recipe hurts most."""
    return {f"Where the damage is: {where}": _damage(mine) for where, mine in by_setting(rows)}


def _damage(rows: pd.DataFrame) -> list[str]:
    lines = []
    for recipe, mine in rows.groupby("recipe"):
        parts = {int(layer): part for layer, part in mine.groupby("layer")}
        found = {layer: measured(part, "layer_kl").value for layer, part in parts.items()}
        damage = {layer: kl for layer, kl in found.items() if kl}
        against = []
        for side in SIDES:
            over = [_over_theory(part, side).value for part in parts.values()]
            if any(over := [value for value in over if value is not None]):
                against.append(f"{side}s {max(over):.2f}")
        if damage and against:
            worst = max(damage, key=damage.get)
            lines.append(
                f"{recipe} hurts layer {worst} most: compressed alone it costs {damage[worst]:.3g} nats, "
                f"{damage[worst] / sum(damage.values()):.0%} of the layers' sum. Its error, over that on Gaussian "
                f"data, is at most {' and '.join(against)}.{_with_bias(parts, damage)}"
            )
    most = {
        (name, side): rows.loc[(rows["metric"] == name) & (rows["part"] == side), "value"].max()
        for name in ("dc_share", "peak_to_rms")
        for side in SIDES
    }
    lines.append(
        f"The real cache beside white noise: at most {most['dc_share', 'key']:.1%} of a layer's key energy and "
        f"{most['dc_share', 'value']:.1%} of its value energy is common offset, which an unsigned Hadamard transform "
        f"gathers in one coordinate; its largest channels are {most['peak_to_rms', 'key']:.1f} (keys) and "
        f"{most['peak_to_rms', 'value']:.1f} (values) times their head's root mean square."
    )
    return lines


def _with_bias(parts: Mapping[int, pd.DataFrame], damage: Mapping[int, float]) -> str:
    """The rank correlation of the layers' damage with the norm of their key bias; nothing without biases."""
    norms = {layer: measured(parts[layer], "bias_norm_key").value for layer in damage}
    if None in norms.values() or len(set(norms.values())) < 3:
        return ""
    rho = stats.spearmanr(list(norms.values()), list(damage.values())).statistic
    largest = max(norms, key=norms.get)
    return (
        f" Over {len(norms)} layers its damage has a rank correlation of {rho:+.2f} (Spearman) with the "
        f"norm of the key bias, which is largest in layer {largest} ({norms[largest]:.0f})."
    )


@style.styled
def figure(rows: pd.DataFrame) -> style.Picture:
    """Which layers a recipe hurts, and how far its errors are from those on Gaussian data."""
    found = list(by_setting(rows))
    canvas, panels = style.sheet([text for setting, _ in found for text in (setting, "")], 2, 1.9)
    for place, (_, mine) in enumerate(found):
        (damage, output), (key, value) = panels[2 * place : 2 * place + 2]
        _by_layer(damage, mine, lambda part: measured(part, "layer_kl"), "KL, nats")
        damage.set_title("this layer alone compressed")
        error = "relative squared error"
        _by_layer(output, mine, lambda part: measured(part, "error_output"), error)
        output.set_title("attention output; dots: single heads")
        heads = mine[(mine["metric"] == "error") & (mine["part"] == "output")]
        for recipe, (shift, tint, _) in _looks(mine).items():
            own = heads[heads["recipe"] == recipe].groupby(["layer", "head"])["value"].mean()
            layer = own.index.get_level_values("layer").to_numpy(float)
            output.plot(layer + shift, own, ".", markersize=2.5, color=tint)
        for ax in (damage, output):
            ax.set_yscale("log")
        for ax, side in ((key, "key"), (value, "value")):
            _by_layer(ax, mine, partial(_over_theory, side=side), "times the Gaussian error")
            ax.axhline(1, color="0.6", linewidth=0.8, zorder=0)
            ax.set_title(f"{side} error over that on Gaussian data")
    return style.picture(
        style.legend(canvas),
        "Where compression hurts: KL divergence when one layer alone is compressed, the error of its attention output, "
        "and its keys' and values' errors over the same codec's on Gaussian data",
        about(rows),
        style.Marks(
            dots="single heads", more="1: as theory promises; above it this cache is harder."
        ),
    )


def _over_theory(part: pd.DataFrame, side: str) -> Value:
    error, theory = (measured(part, f"{name}_{side}") for name in ("error", "gaussian_error"))
    if error.value is None or not theory.value:
        return error if error.value is None else Value(None, note=theory.note)
    return error.map(lambda value: value / theory.value)


def _by_layer(
    ax: Axes, rows: pd.DataFrame, of: Callable[[pd.DataFrame], Value], label: str
) -> None:
    """One line per recipe over the layers, with intervals where there are any."""
    for recipe, (shift, tint, marker) in _looks(rows).items():
        each = rows[rows["recipe"] == recipe].groupby("layer")
        spots = [(int(layer) + shift, of(part)) for layer, part in each]
        look = {"color": tint, "elinewidth": 0.8, "markersize": 3, "linewidth": 1}
        style.series(ax, spots, fmt=f"{marker}-", label=recipe, **look)
    n_layers = int(rows["layer"].max()) + 1
    style.number_ticks(ax, range(0, n_layers, max(1, n_layers // 8)))
    ax.set_xlabel("layer")
    ax.set_ylabel(label)


def _looks(rows: pd.DataFrame) -> Mapping[str, tuple[float, str, str]]:
    """Horizontal offset, colour and marker of each recipe."""
    recipes = sorted(set(rows["recipe"]))
    look, middle = style.looks(recipes), (len(recipes) - 1) / 2
    return {name: (0.05 * (place - middle), *look[name]) for place, name in enumerate(recipes)}


TABLES = {"layer_sensitivity": table}
FIGURES = {"layer_sensitivity": figure}
FINDINGS = findings
