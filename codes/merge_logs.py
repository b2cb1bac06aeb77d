"""Join the logs of a run's shards into the one log that they are parts of.

python codes/merge_logs.py logs/<...>-shard-*-of-8.log
"""

if __name__ == "__main__":
    import spacte.script  # noqa: F401 - first, for Ctrl-C during the other imports
    from spacte.certify import relog

    relog.merge_main(__doc__)
