"""Certification logs read: runs, tables, comparisons, pictures, the page."""
