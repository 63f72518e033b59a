"""Drift while decoding: KL divergence against the position in the reply, and its slope over the prompts.

A slope is that of the least-squares line through the blocks of one reply, in percent of this reply's mean KL per 100
tokens, so that every prompt weighs the same; its interval and test are over prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import style
from analysis.frontier import about, by_setting
from analysis.render import Column, Table, compact, fixed, keys, span
from analysis.statistics import (
    ALPHA,
    BASELINE,
    QUALITY,
    Measure,
    Value,
    newest,
    plain_mean,
    whole_samples,
)
from polykv.evaluation.statistics import (
    MIN_DOCUMENTS,
    Shift,
    holm,
    paired_ratio,
    shift,
    skewed_interval,
)

SETTING = ("model", "weights", "document")
EXACT, PAGES = "exact", "pages"
PER = 100  # tokens
LEAST = 4  # blocks of a reply with a slope
NO_SLOPE = (
    f"a slope takes 2 prompts whose replies have {LEAST} blocks and a KL that is not rounding"
)
SAME_TOP1 = Measure("same_top1", reduce=plain_mean)


@dataclass(frozen=True)
class Line:
    """One recipe in one mode on the prompts of one setting.

    Attributes:
        rows: of this recipe and mode.
        surprisal: that of the uncompressed run, by text and block.
    """

    recipe: str
    mode: str
    rows: pd.DataFrame
    surprisal: pd.Series

    @property
    def label(self) -> str:
        """The mode, with the size of pages."""
        pages = self.rows["page_tokens"].dropna()
        return f"{PAGES} of {int(pages.iloc[0])}" if len(pages) else self.mode

    @cached_property
    def blocks(self) -> pd.DataFrame:
        """`value` (KL), `n` and `position` by text and block; seeds of one text are averaged."""
        return _blocks(self.rows, "kl")

    @cached_property
    def by_text(self) -> pd.Series:
        """The mean KL of each reply."""
        whole = whole_samples(self.rows[self.rows["metric"] == "kl"])
        return whole.groupby("text")["value"].mean()

    @cached_property
    def slope(self) -> Shift | None:
        """Percent of the mean KL per 100 tokens."""
        return None if self.recipe == BASELINE else _shift(self.blocks)

    @cached_property
    def held_slope(self) -> Shift | None:
        """As `slope`, at equal surprisal of the uncompressed run (a second regressor)."""
        return None if self.recipe == BASELINE else _shift(self.blocks, self.surprisal)

    def quarter(self, last: bool) -> Value:
        """Mean KL of the tokens in the first or the last quarter of the blocks."""
        block = self.blocks.index.get_level_values("block")
        quarter = (int(block.max()) + 1) // 4 if len(block) else 0
        part = self.blocks[block > block.max() - quarter if last else block < quarter]
        if part.empty or part["value"].isna().any():
            return Value(None, note=NO_SLOPE if part.empty else "a KL is missing")
        return Value(float(np.average(part["value"], weights=part["n"])))


def _blocks(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    found = rows[(rows["metric"] == metric) & rows["block"].notna()]
    return found.groupby(["text", "block"])[["value", "n", "position"]].mean().astype(float)


def _shift(blocks: pd.DataFrame, held: pd.Series | None = None) -> Shift | None:
    """The slopes of all replies against 0; None where fewer than two have one."""
    slopes = [_slope(part, held) for _, part in blocks.groupby(level="text")]
    slopes = [found for found in slopes if found is not None]
    return shift(slopes) if len(slopes) > 1 else None


def _slope(blocks: pd.DataFrame, held: pd.Series | None) -> float | None:
    """Of one reply, in percent of its mean per PER tokens; with `held` as a second regressor."""
    y, n = blocks["value"].to_numpy(), blocks["n"].to_numpy()
    if len(blocks) < LEAST or not np.isfinite(y).all() or not y.any():
        return None
    middle = blocks["position"].to_numpy() + (n - 1) / 2
    columns = [np.ones_like(y), middle / PER]
    if held is not None:
        columns.append(held.reindex(blocks.index).to_numpy(float))
    weight = np.sqrt(n)
    found, *_ = np.linalg.lstsq(np.stack(columns, 1) * weight[:, None], y * weight, rcond=None)
    return float(100 * found[1] / np.average(y, weights=n))


def settings_of(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(heading, rows) of each set of prompts, then of all sets of a model together; the newest cells only."""
    for _, of_model in rows.groupby(["model", "weights"]):
        found = [(setting, _current(mine)) for setting, mine in by_setting(of_model, SETTING)]
        yield from found
        sets = sorted(of_model["document"].unique())
        if len(sets) > 1:
            joint = pd.concat([mine for _, mine in found]).assign(document=" and ".join(sets))
            yield from by_setting(joint, SETTING)


def _current(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(
        [newest(part, ["seed", "page_tokens"]) for _, part in rows.groupby(["recipe", "metric"])]
    )


def lines(rows: pd.DataFrame) -> list[Line]:
    """Every recipe in every mode, least mean KL in mode `exact` first."""
    surprisal = _blocks(rows, "nll_full")["value"]
    scored = rows[rows["mode"].isin([EXACT, PAGES])]
    found = [
        Line(recipe, mode, part, surprisal)
        for (recipe, mode, _), part in scored.groupby(
            ["recipe", "mode", "page_tokens"], dropna=False
        )
    ]
    rank = {line.recipe: line.by_text.mean() for line in found if line.mode == EXACT}
    return sorted(found, key=lambda line: (rank.get(line.recipe, 0), line.recipe, line.label))


def table(rows: pd.DataFrame) -> Table:
    """Mean KL and slope of every recipe and mode."""
    columns = [
        *keys("recipe", "mode"),
        Column("kl", "KL [95 %]", compact, interval=True),
        Column("first", "first quarter", compact),
        Column("last", "last quarter", compact),
        Column("slope", "slope [95 %]", fixed(1, "+"), interval=True),
        Column("detectable", "detectable", fixed(1)),
        Column("held", "at equal surprisal [95 %]", fixed(1, "+"), interval=True),
        Column("times", "pages / exact [95 %]", fixed(2), interval=True),
        Column("same_top1", "top-1", fixed(4)),
    ]
    found = []
    for setting, mine in settings_of(rows):
        of_setting = lines(mine)
        exact = {line.recipe: line for line in of_setting if line.mode == EXACT}
        for line in of_setting:
            found.append(
                {"section": setting, "recipe": line.recipe, "mode": line.label}
                | {"kl": QUALITY["kl_mean"].of(line.rows, ["cell"])}
                | {"first": line.quarter(False), "last": line.quarter(True)}
                | {"slope": _value(line.slope), "held": _value(line.held_slope)}
                | {"detectable": _detectable(line.slope)}
                | {"times": _times(line, exact.get(line.recipe))}
                | {"same_top1": SAME_TOP1.of(whole_samples(line.rows), ["cell"])}
            )
    caption = (
        "KL divergence along the uncompressed run's own greedy reply, fed token by token to a compressed prompt; new "
        f"tokens are kept exact or quantized in pages. {about(rows)}"
    )
    legend = (
        "n: tokens of a reply. Slope: percent of a reply's mean KL per 100 tokens, mean and 95 % interval (t) over "
        "prompts; detectable: the smallest slope that these prompts show at 5 % with 80 % power. At equal surprisal: "
        "with the uncompressed run's surprisal of each block as a second regressor, since a text that becomes more "
        "certain, as a repetitive one does, lowers every KL. Pages / exact: ratio of KL by prompt, geometric mean. "
        "Top-1: share of tokens that greedy decoding would choose alike"
    )
    return Table("decode_drift", caption, columns, found, legend)


def _value(found: Shift | None) -> Value:
    if found is None:
        return Value(None, note=NO_SLOPE)
    return Value(found.mean, found.low, found.high, over="prompts")


def _detectable(found: Shift | None) -> Value:
    return Value(None, note=NO_SLOPE) if found is None else Value(found.detectable)


def _times(line: Line, exact: Line | None) -> Value:
    """KL over that with exact new tokens, on the same prompts."""
    if line.mode == EXACT or exact is None:
        return Value(None, note="new tokens are exact, or were not measured exact")
    both = pd.concat([line.by_text, exact.by_text], axis=1).dropna()
    both = both[(both > 0).all(axis=1)].to_numpy().T
    if both.shape[1] < 2:
        return Value(None, note="a ratio takes 2 prompts with a KL above 0")
    ratio = paired_ratio(*both)
    return Value(ratio.ratio, ratio.low, ratio.high, n=both.shape[1], over="prompts")


def findings(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Which recipes drift, by model: on all of its prompts together."""
    found = {}
    for _, of_model in rows.groupby(["model", "weights"]):
        *_, (setting, mine) = settings_of(of_model)
        said = _drifting(mine)
        if said:
            found[f"Drift while decoding: {setting}"] = said
    return found


def _drifting(rows: pd.DataFrame) -> list[str]:
    measured = [line for line in lines(rows) if line.slope and line.held_slope]
    if not measured:
        return []
    counts = whole_samples(rows[rows["metric"] == "kl"])["n"]
    n_prompts = max(len(line.by_text) for line in measured)
    said = []
    for kind, what in (
        ("slope", ""),
        ("held_slope", ", at equal surprisal of the uncompressed run,"),
    ):
        p = dict(zip(map(id, measured), holm([getattr(x, kind).p for x in measured]), strict=True))
        for label in dict.fromkeys(line.label for line in measured):
            mine = [line for line in measured if line.label == label]
            sure = [line for line in mine if p[id(line)] < ALPHA]
            up = [line for line in sure if getattr(line, kind).mean > 0]
            down = [line for line in sure if getattr(line, kind).mean < 0]
            open_ = [line for line in mine if p[id(line)] >= ALPHA]
            parts = [
                f"{verb} for {', '.join(_told(line, kind) for line in which)}"
                for verb, which in (("rises", up), ("falls", down))
                if which
            ]
            if open_:
                limit = span([getattr(line, kind).detectable for line in open_], ".0f")
                names = ", ".join(line.recipe for line in open_)
                parts.append(f"shows no slope for {names} (one of {limit} % would have shown)")
            said.append(
                f"New tokens {_kept(label)}: KL{what} {'; '.join(parts)}, in percent of its mean per {PER} tokens "
                f"({n_prompts} prompts, {span(counts, ',.0f')} tokens each; t test over prompts, Holm over "
                f"{len(measured)})."
            )
    text = _shift(_blocks(rows, "nll_full"))
    if text:
        said.append(
            f"The uncompressed run's own surprisal changes by {text.mean:+.0f} % of its mean per {PER} tokens "
            f"[{text.low:+.0f}, {text.high:+.0f}]."
        )
    return said


def _kept(label: str) -> str:
    return "exact" if label == EXACT else f"quantized in {label}"


def _told(line: Line, kind: str) -> str:
    found = getattr(line, kind)
    return f"{line.recipe} {found.mean:+.0f} [{found.low:+.0f}, {found.high:+.0f}]"


@style.styled
def figure(rows: pd.DataFrame) -> style.Picture | str:
    """KL against the position in the reply, a panel for each mode."""
    rows = rows[rows["recipe"] != BASELINE]  # its KL is rounding
    found = [
        (setting, lines(mine))
        for setting, mine in settings_of(rows)
        if mine["document"].iloc[0] in set(rows["document"])
    ]
    labels = list(dict.fromkeys(line.label for _, of in found for line in of))
    if not any(line.by_text.gt(0).any() for _, of in found for line in of):
        return "no recipe has a KL divergence above 0"
    canvas, panels = style.sheet([setting for setting, _ in found], len(labels), 2.0, share_y=True)
    tints = style.colours(dict.fromkeys(line.recipe for _, of in found for line in of))
    for row, (_, of_setting) in zip(panels, found, strict=True):
        for ax, label in zip(row, labels, strict=True):
            for line in of_setting:
                if line.label == label and line.by_text.gt(0).any():
                    _draw(ax, line, tints[line.recipe])
            ax.set_title(f"new tokens {_kept(label)}")
            ax.set_xlabel("tokens into the reply")
            style.plain_log(ax)
        row[0].set_ylabel("KL, nats per token")
    return style.picture(
        style.legend(canvas),
        "KL divergence along the uncompressed run's own greedy reply after a compressed prompt",
        about(rows),
        style.Marks(
            panels=True, more=f"Bands: 95 % intervals over prompts, from {MIN_DOCUMENTS} up."
        ),
    )


def _draw(ax: Axes, line: Line, tint: str) -> None:
    """Means over prompts by block, with their intervals."""
    by_block = line.blocks.groupby(level="block")
    middle = by_block["position"].mean() + (by_block["n"].mean() - 1) / 2
    ax.plot(middle, by_block["value"].mean(), color=tint, linewidth=1.1, label=line.recipe)
    ends = [skewed_interval(part.to_numpy(), (0, np.inf)) for _, part in by_block["value"]]
    if by_block.size().min() >= MIN_DOCUMENTS and all(ends):
        ax.fill_between(middle, *zip(*ends, strict=True), color=tint, alpha=0.15, linewidth=0)


TABLES = {"decode_drift": table}
FIGURES = {"decode_drift": figure}
FINDINGS = findings
