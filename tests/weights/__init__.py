"""Tests of `farms_tb.weights`."""
