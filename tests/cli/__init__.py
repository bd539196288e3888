"""Tests of `farms_tb.cli`."""
