"""Tests of `farms_tb.spectra`."""
