#!/bin/sh
# 50 images of each class on many machines: sbatch deploy/slurm-array.sh
# Each task of the array draws its shard. A task that is requeued goes on where it stopped. To repeat some of them, give
# sbatch --array=3,5: the number of shards must stay the same, so it is not taken from SLURM_ARRAY_TASK_COUNT.
#SBATCH --job-name=dsd-generate
#SBATCH --array=1-8
#SBATCH --cpus-per-task=4
#SBATCH --mem=2G
#SBATCH --time=01:00:00
#SBATCH --requeue

# For a GPU: #SBATCH --gpus-per-task=1, and --device cuda
exec dsd-generate --model "${MODEL:?the model directory}" --per-class 50 --classes all --seed 0 \
    --shard "$SLURM_ARRAY_TASK_ID/8" --threads "$SLURM_CPUS_PER_TASK" -o "${SAMPLES:-samples}"
