"""Join the logs of a run's shards into the one log that they are parts of.

python codes/merge_logs.py logs/<...>-shard-*-of-8.log
"""

from spacte import relogging

if __name__ == "__main__":
    relogging.merge_main(__doc__)
