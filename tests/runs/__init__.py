"""Tests of `grasp_hf.runs`."""
