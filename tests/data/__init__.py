"""Tests of `grasp_hf.data`."""
