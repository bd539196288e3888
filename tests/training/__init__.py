"""Tests of `farms_tb.training`."""
