"""Tests of `farms_tb.viewing`."""
