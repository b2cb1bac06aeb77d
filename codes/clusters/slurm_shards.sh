#!/bin/bash
# One certification as N jobs of SLURM, each on a part of the images, and their merge. Unlike torchrun's processes they need
# not run at the same time. What is lost with a node is the images in progress. 8 shards:
#
#   sbatch --array=1-8 codes/clusters/slurm_shards.sh 8 codes/0Gaussian --model_path save/<...>/epoch150.pth --skip 20
#   python codes/merge_logs.py codes/0Gaussian/logs/<...>/<run>-certify-skip-20-shard-*-of-8.log     # once all have ended
#
# 8 is given, and not SLURM_ARRAY_TASK_COUNT: that is 1 where shard 3 is submitted again, --array=3. On CPU nodes
# also give --images_per_pass 500 (any number, the same for all): else each shard measures its fastest, and the last digits,
# which decide near ties, may differ from shard to shard. merge_logs.py says so where they ran differently. The time limit
# has to hold some images, or a shard goes back into the queue for ever.
#
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
# Before its time is over, and after a node is lost, a shard goes back into the queue, and resumes.
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
set -u
task=${SLURM_ARRAY_TASK_ID:-0}
if ! { [ "$task" -ge 1 ] && [ "$task" -le "${1:-0}" ]; } 2>/dev/null; then
    echo "usage: sbatch --array=1-N slurm_shards.sh N FOLDER FLAGS OF certify_mhead.py" >&2
    exit 2
fi
shard="$task/$1"
cd "$2" || exit 2
shift 2
back() { scontrol requeue "${SLURM_ARRAY_JOB_ID}_$task"; } # SLURM_JOB_ID is the array's in its last job
trap 'back; wait' USR1
python certify_mhead.py "$@" --shard "$shard" &
wait $!
code=$?
[ $code = 75 ] && back # the shard's files are still locked: by its last run, on a node that SLURM has lost
exit $code
