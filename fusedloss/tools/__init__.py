"""What `python -m fusedloss` runs: checks, timings, memory figures."""
