"""What happens when something goes wrong: `python -m reliability` tries it and writes results/reliability.md."""
