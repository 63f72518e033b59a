"""Coverage-guided fuzzing of what polykv reads from other machines: `python -m fuzz card --seconds 60`."""
