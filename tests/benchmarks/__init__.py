"""Measurements that are too slow or too machine-dependent to be tests."""
