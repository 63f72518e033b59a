"""GSM8K accuracy as an `evaluate` module: `evaluate.load("polykv/evaluation/gsm8k_metric.py")`."""

from collections.abc import Sequence

import datasets
import evaluate

from polykv.evaluation import gsm8k


class GSM8K(evaluate.Metric):
    """Accuracy in percent under each extraction; predictions are replies, references the gold answers."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = [datasets.Value(kind) for kind in ("string", "int64", "float64")]
        text = kinds[0]
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Cobbe et al. 2021, arXiv 2110.14168",
            inputs_description="predictions: generated replies; references: numbers, or texts such as '... #### 18'",
            features=[
                datasets.Features({"predictions": text, "references": kind}) for kind in kinds
            ],
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str | int | float]
    ) -> dict[str, float | None]:
        found = gsm8k.right(predictions, references)
        return {
            how: 100 * sum(right) / len(right) if right else None for how, right in found.items()
        }
