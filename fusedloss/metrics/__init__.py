"""Metrics that are computed from the statistics of the losses."""
