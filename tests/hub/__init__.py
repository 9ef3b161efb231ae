"""Tests of `grasp_hf.hub`."""
