"""Faults on purpose: kills, full disks, hostile files, bad input, load. See `make faults`."""
