"""Latency, throughput, accuracy parity and localisation; knows every room."""
