"""Tests of farms_tb and of the recipes."""
