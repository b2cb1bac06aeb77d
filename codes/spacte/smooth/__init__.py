"""Votes under noise, and what they prove."""
