"""Tests of `grasp_hf.sources`."""
