"""Evaluations of test images: certify, predict, attack; logs made from logs."""
