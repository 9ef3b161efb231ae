"""Tests of `grasp_hf.validation`."""
