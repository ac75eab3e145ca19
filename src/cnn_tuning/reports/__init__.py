"""Plots and pages from files; no computation of their own."""
