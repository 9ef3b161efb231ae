"""Tests of `grasp_hf.merging`."""
