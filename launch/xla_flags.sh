# Sourced by launch/job.sh: the only list of the compiler flags that we recommend, and why. A flag that the environment
# already sets wins, since the last one counts. The gain has not been timed on a chip.

# xla_flags PLATFORM: exports XLA_FLAGS, or for tpu LIBTPU_INIT_ARGS.
xla_flags() {
    local flags=()
    case $1 in
        cuda)
            # Start collectives early and wait for them late; in the loop over blocks, overlap one block's collectives with
            # the next block's products; combine small collectives into large ones (128 MB).
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
            # Overlap FSDP's gathers with the products. Left out: xla_tpu_enable_data_parallel_all_reduce_opt and
            # xla_tpu_data_parallel_opt_different_sized_ops, which did not change the program of a DiT-XL/2 step.
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
