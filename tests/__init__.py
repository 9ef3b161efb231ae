"""Tests of grasp_hf: real tiny models, the real Hub client, real processes."""
