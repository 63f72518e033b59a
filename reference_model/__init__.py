"""How the embedded reference model was made: its tokenizer, curriculum, training and evaluation (`make reference`).

Not part of the package: polykv brings the weights and writes the held-out documents (polykv/reference). In order:
`python -m reference_model.train`, `python -m reference_model.evaluate`, `python -m reference_model.report`.
"""
