#!/bin/bash
# A job on three nodes with one GPU each, from the top of a checkout that all nodes see, after 'make setup' there:
#   sbatch docker/slurm/train.sh                                    the paper's experiment
#   sbatch docker/slurm/train.sh python train/games.py              another command
#   LAUNCH=horovodrun sbatch docker/slurm/train.sh                  without Slurm's PMIx ('srun --mpi=list' names it)
# INTERFACE=NAME picks the network for horovodrun. docs/cluster.md says more.
#SBATCH --job-name=hvd_qgenx
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Ranks are told two minutes before the end.
#SBATCH --signal=TERM@120
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
[ $# -gt 0 ] || set -- python train/wgan.py --preset paper --device cuda

# A PMIx server of Slurm's starts the ranks; MPI finds the others through it.
by_srun() {
    exec srun --mpi=pmix --kill-on-bad-exit=1 "$@"
}

# horovodrun starts them by ssh. Not through MPI: mpirun would find Slurm and call srun itself.
by_horovodrun() {
    local slots=${SLURM_NTASKS_PER_NODE:-1}
    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/:$slots/" | paste -sd,)
    exec horovodrun --gloo ${INTERFACE:+--network-interfaces "$INTERFACE"} -np "$SLURM_NTASKS" -H "$hosts" "$@"
}

case "${LAUNCH:-srun}" in
    srun) by_srun "$@" ;;
    horovodrun) by_horovodrun "$@" ;;
    *) echo "LAUNCH must be srun or horovodrun, got '$LAUNCH'" >&2; exit 2 ;;
esac
