"""The parts of gpu_report.py, each a function of a Part that runs in a process of its own."""
