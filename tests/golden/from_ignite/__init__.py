"""Runs the configs of the golden files through pytorch-ignite."""
