"""Tests of `grasp_hf.models`."""
