#!/bin/bash
# One run over several nodes of SLURM: torchrun on each of them, a process for each GPU. Training divides each batch among
# the processes, certification, prediction and attack divide the images; --resume and the logs make it resumable. The folders
# must be shared by the nodes.
#
#   sbatch codes/clusters/slurm_torchrun.sh codes/0Gaussian train.py --dataset ImageNet --arch R50 ... --resume
#   sbatch --nodes=8 --partition=P codes/clusters/slurm_torchrun.sh codes/0Gaussian certify_mhead.py --model_path ...
#
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# Before its time is over, and after a node is lost, it goes back into the queue, and resumes.
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
set -eu
processes=${SLURM_GPUS_ON_NODE:-1} # on a cluster without GPUs: one for each node
port=$((20000 + SLURM_JOB_ID % 10000))
cd "$1"
shift
trap 'scontrol requeue "$SLURM_JOB_ID"; wait' USR1 # SLURM then ends all of it: what is on disk is whole
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$processes" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$(hostname):$port" -- "$@" &
wait $!
