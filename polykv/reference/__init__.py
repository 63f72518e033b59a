"""The embedded reference model's weights, and the generator of its held-out documents, questions and word problems.

Everything is generated from a seed, and no fact of a held-out document was seen in training. Only `exact_match` imports
torch. The model is trained by reference_model/, next to the package.
"""

from pathlib import Path

WEIGHTS_DIR = Path(__file__).resolve().parent / "weights"
