"""Measuring: the sweep over context lengths, and its picture."""
