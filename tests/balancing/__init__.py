"""Tests of `farms_tb.balancing`."""
