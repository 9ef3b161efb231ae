"""Tests of `grasp_hf.config`."""
