"""The embedded reference model's weights, and its held-out documents, questions and word problems.

All are functions of a seed: no fact of a held-out document was seen in training. Only `exact_match` imports torch.
The model was made by reference_model/, which stands beside the package.
"""

from pathlib import Path

WEIGHTS_DIR = Path(__file__).resolve().parent / "weights"
