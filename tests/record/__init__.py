"""Tests of `grasp_hf.record`."""
