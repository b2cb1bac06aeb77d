"""Multi-head smoothed classifiers with certified L2 robustness: one library for every base defence."""
