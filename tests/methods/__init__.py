"""Tests of `grasp_hf.methods`."""
