"""Executors of a Program that live in Python."""
