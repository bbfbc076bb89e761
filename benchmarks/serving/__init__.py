"""Serving benchmarks: this server and alternatives under the same load."""
