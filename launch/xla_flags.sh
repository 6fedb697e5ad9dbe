# Sourced by launch/job.sh: the compiler flags that we recommend, and why, in the one place where they are kept. A flag that
# the environment already sets wins, since the last one counts. What they gain has not been timed on a chip.

# xla_flags PLATFORM: exports XLA_FLAGS, or for tpu LIBTPU_INIT_ARGS.
xla_flags() {
    local flags=()
    case $1 in
        cuda)
            # Collectives are sent early and waited for late; one block's run beside the next block's products, in the loop
            # over blocks; and there are few large ones (128 MB), not many small ones.
            flags=(
                --xla_gpu_enable_latency_hiding_scheduler=true
                --xla_gpu_enable_pipelined_all_gather=true
                --xla_gpu_enable_pipelined_reduce_scatter=true
                --xla_gpu_enable_pipelined_all_reduce=true
                --xla_gpu_all_gather_combine_threshold_bytes=134217728
                --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
                --xla_gpu_all_reduce_combine_threshold_bytes=134217728
            )
            export XLA_FLAGS="${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
            ;;
        tpu)
            # Gathers of fsdp run beside the products. Left out: xla_tpu_enable_data_parallel_all_reduce_opt and
            # xla_tpu_data_parallel_opt_different_sized_ops, which left the program of a DiT-XL/2 step as it was.
            flags=(
                --xla_tpu_enable_async_collective_fusion=true
                --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
                --xla_tpu_enable_async_collective_fusion_multiple_steps=true
                --xla_tpu_overlap_compute_collective_tc=true
                --xla_enable_async_all_gather=true
            )
            export LIBTPU_INIT_ARGS="${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
            ;;
    esac
}
