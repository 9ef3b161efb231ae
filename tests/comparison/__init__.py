"""Tests of `grasp_hf.comparison`."""
