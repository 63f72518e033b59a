"""GSM8K accuracy as an `evaluate` module: `evaluate.load("polykv/evaluation/gsm8k_metric.py")`."""

from collections.abc import Sequence

import datasets
import evaluate

from polykv.evaluation import gsm8k
from polykv.results import Rows


class GSM8K(evaluate.Metric):
    """Accuracy in percent under both extractions; predictions are answers, references the right numbers."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = [datasets.Value(kind) for kind in ("string", "int64", "float64")]
        text = kinds[0]
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Cobbe et al. 2021, arXiv 2110.14168",
            inputs_description="predictions: generated answers; references: numbers, or texts such as '... #### 18'",
            features=[
                datasets.Features({"predictions": text, "references": kind}) for kind in kinds
            ],
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str | int | float]
    ) -> dict[str, float | None]:
        rows = Rows()
        gsm8k.add_rows(rows, predictions, references, "evaluate")
        return {how: row["value"] for how, row in zip(gsm8k.EXTRACTIONS, rows, strict=False)}
