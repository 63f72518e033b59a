"""One module per study (study.py), and what runs them: sweep, session, rows, settings."""
