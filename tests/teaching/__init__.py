"""Tests of `grasp_hf.teaching`."""
