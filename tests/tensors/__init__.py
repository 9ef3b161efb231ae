"""Tests of `grasp_hf.tensors`."""
