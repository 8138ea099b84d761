"""Objectives whose targets are tokens."""
