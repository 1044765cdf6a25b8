"""The faults that the offload engines must stand, and where each is tested.

=== ================================================ ========================================================
row fault                                            required
=== ================================================ ========================================================
1   no space at the start                            refused, with the bytes needed and free
2   no space in mid run                              a typed error; what was there is intact; goes on after
3   quota, file size limit                           as 2
4   a read fails                                     repeated; then an error that names the tensor
5   a write fails, a sync fails once                 the bytes count as lost; a sync is not asked for again
6   short transfers, EINTR, EAGAIN                   gone on with to the end
7   large blocks, odd tails, no direct I/O           probed by a write and a read; padded; a warned fallback
8   torn write: SIGKILL, loss of power               found; the generation before is there
9   misdirected and stale reads                      found by identity and generation
10  flipped bits on the disk and in memory           found on reading, and named
11  slow and hanging disks                           bounded memory, a log, an error in time, no deadlock
12  a tier is full                                   an error; never beyond the budget; in any order
13  slots run out                                    progress with one slot in each direction
14  files of a dead run                              removed only if it is certainly dead; never read
15  two runs, two sessions, fork                     apart; a child takes nothing from its parent
16  other users                                      0700, no links followed, no names, no core dumps
17  a buffer changes under its transfer              found
18  exceptions and Ctrl-C in mid step                everything is released; the next step is right
19  views, ties, odd tensors, backward twice         the same gradients, each storage once
20  NaN and inf, clipping, accumulation, overlapped  as without overlap
21  python -O, -W error, exit                        the same
22  limits, seccomp, other file systems              without it, or a typed error
23  clock jumps, cleaners, unplugged devices         goes on with what is open; an error on reopening
24  another model, dtype, order on resume            refused, with the differences
=== ================================================ ========================================================

By real means where there are any: loop-mounted ext4 (also with 4096-byte blocks, frozen, filled, inside a
full one, unmounted under the run), truncated images, punched holes, limits of the process, SIGKILL,
signals, seccomp, another user. The rest by ``FaultyBackend`` and scripted targets; so quotas, for which the
kernel that this was written on has no format, and syncs that fail once.
"""

from __future__ import annotations

NOTICED = frozenset({1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 17, 24})
"""Rows of which something must be said: what is hurt is named, and nothing wrong is used. Of the others
nothing needs to be: the work goes on and comes out right."""


def faults() -> dict[int, tuple[str, str]]:
    """By row the fault and what is required, as in the table above."""
    lines = (__doc__ or "").splitlines()
    columns = [
        (line[:3], line[4:53].strip(), line[53:].strip()) for line in lines if line[:3].strip().isdigit()
    ]
    return {int(number): (fault, required) for number, fault, required in columns}


TESTS: dict[int, tuple[str, ...]] = {
    1: (
        "test_swap_directory.py::test_a_full_disk_is_refused_at_the_start_and_harmless_in_mid_run",
        "test_swap_directory.py::test_more_than_the_disk_has_is_refused_at_the_start",
        "faults/test_full_disks.py::test_a_budget_without_room_for_the_state_is_refused_before_the_first_step",
    ),
    2: (
        "faults/test_full_disks.py::test_a_disk_that_fills_up_costs_nothing_but_the_write",
        "faults/test_full_disks.py::test_a_run_on_a_full_disk_goes_on_from_its_checkpoint_when_there_is_room",
        "test_tier_faults.py::test_a_failed_write_is_never_published",
        "test_optimizer_refusals.py::test_a_full_disk_in_mid_update_raises_and_stops",
        "test_snapshot_files.py::test_error_in_the_middle_leaves_nothing",
    ),
    3: (
        "faults/test_full_disks.py::test_a_file_size_limit_in_mid_run_is_an_error_and_lifting_it_is_enough",
        "faults/test_full_disks.py::test_a_quota_is_met_at_the_start_with_a_typed_error_and_leaves_nothing",
        "test_swap_directory.py::test_a_file_size_limit_is_a_typed_error_at_the_start_and_in_mid_run",
        "test_snapshot_files.py::test_a_file_size_limit_is_met_with_a_typed_error",
    ),
    4: (
        "faults/test_broken_devices.py::"
        "test_a_run_whose_disk_loses_its_end_names_the_tensor_and_goes_on_from_its_checkpoint",
        "faults/test_broken_devices.py::test_a_read_that_fails_once_is_repeated_said_and_counted",
        "test_swap_directory.py::test_a_device_that_loses_its_end_is_an_error_that_names_the_tensor",
        "test_tier_faults.py::test_a_failed_read_leaves_the_extent_readable",
    ),
    5: (
        "faults/test_broken_devices.py::test_a_device_that_cannot_write_is_an_error_that_names_the_tensor",
        "faults/test_broken_devices.py::"
        "test_a_sync_that_fails_once_is_told_to_every_writer_that_was_under_way",
        "faults/test_broken_devices.py::test_a_checkpoint_whose_sync_failed_is_written_anew",
    ),
    6: (
        "test_io.py::test_short_transfers_resume_at_a_block",
        "test_io.py::test_interruptions_are_retried",
        "test_io.py::test_endless_refusal_ends",
        "faults/test_broken_devices.py::test_signals_in_mid_transfer_change_nothing",
    ),
    7: (
        "faults/test_broken_devices.py::test_blocks_of_4096_bytes_and_tails_that_are_none",
        "test_io.py::test_file_round_trip_touches_nothing_else",
        "test_swap_directory.py::test_no_direct_io_is_refused_with_the_remedy_and_leaves_nothing",
        "test_swap_directory.py::test_a_file_system_that_refuses_direct_writes_is_used_buffered_when_allowed",
    ),
    8: (
        "faults/test_wrong_bytes.py::test_what_is_reopened_after_sigkill_is_what_was_saved_or_is_refused",
        "faults/test_wrong_bytes.py::test_no_loss_of_power_costs_more_than_the_checkpoint_in_the_making",
        "faults/test_kill_resume.py::test_what_was_killed_goes_on_bit_for_bit",
        "test_snapshot_files.py::test_every_prefix_of_the_system_calls_leaves_a_whole_checkpoint",
        "test_snapshot_files.py::test_kill_at_any_moment",
        "test_manifest.py::test_bytes_newer_than_the_table_are_found",
    ),
    9: (
        "faults/test_wrong_bytes.py::test_two_extents_that_lie_in_each_others_place_and_an_old_generation",
        "faults/test_wrong_bytes.py::test_a_checkpoint_file_that_is_older_than_the_others_is_named",
        "test_tier_faults.py::test_a_swapped_extent_table_is_found",
        "test_tier_faults.py::test_lost_torn_flipped_and_stale_bytes_are_found",
    ),
    10: (
        "faults/test_wrong_bytes.py::test_no_flipped_bit_in_a_run_goes_unnoticed",
        "test_tier_faults.py::test_one_flipped_bit_in_the_arena_is_found_and_named",
        "test_coded.py::test_one_flipped_bit_on_the_disk_is_found_and_named",
        "test_snapshot_files.py::test_a_damaged_file_is_named",
    ),
    11: (
        "faults/test_stalls.py::"
        "test_a_disk_that_hangs_is_told_of_ends_in_an_error_and_serves_when_it_is_back",
        "faults/test_stalls.py::test_a_run_whose_disk_hangs_ends_with_an_error_in_time",
        "faults/test_stalls.py::test_a_slow_tier_never_holds_more_than_the_rings",
        "faults/test_stalls.py::test_a_slot_with_a_transfer_that_hangs_is_nobodys",
        "faults/test_stalls.py::test_a_staging_slot_with_a_transfer_that_hangs_is_kept_for_it",
        "faults/test_stalls.py::test_a_coded_tier_that_hangs_for_a_while_loses_nothing_later",
        "test_io.py::test_close_does_not_wait_for_ever_on_a_stalled_device",
    ),
    12: (
        "faults/test_full_disks.py::test_what_fits_fits_in_any_order_and_never_more",
        "test_tiers.py::test_a_full_tier_says_what_is_short",
        "test_extents.py::test_free_list_never_overlaps_and_counts_right",
        "test_coded.py::test_room_for_the_worst_case_is_refused_at_allocation_and_never_later",
    ),
    13: (
        "faults/test_stalls.py::test_one_slot_in_each_direction_is_enough",
        "test_tiers.py::test_progress_with_one_slot_and_many_tensors",
        "test_slab.py::test_two_threads_that_wait_for_each_other_do_not_hang",
    ),
    14: (
        "faults/test_processes.py::test_a_killed_run_leaves_what_the_next_one_removes",
        "test_swap_directory.py::test_a_killed_run_is_reaped_and_a_living_one_is_not",
        "test_swap_directory.py::test_what_is_not_provably_dead_is_left",
    ),
    15: (
        "faults/test_processes.py::test_workers_of_a_data_loader_and_their_exit_change_nothing",
        "faults/test_processes.py::test_a_child_that_closes_collects_and_exits_takes_nothing_from_its_parent",
        "faults/test_processes.py::test_an_interpreter_exit_in_a_child_leaves_the_run_and_its_directory",
        "faults/test_processes.py::"
        "test_memory_that_a_child_does_not_inherit_is_not_given_to_anything_else_in_it",
        "faults/test_processes.py::test_two_sessions_in_one_process_and_one_directory",
        "faults/test_processes.py::test_two_sessions_in_two_threads",
        "../memtrain/test_session.py::test_two_sessions_at_once_are_bit_equal",
        "test_swap_directory.py::test_two_stores_in_one_directory_do_not_see_each_other",
    ),
    16: (
        "faults/test_processes.py::test_another_user_reads_neither_the_directory_nor_the_arena",
        "faults/test_processes.py::test_a_core_dump_leaves_staging_out",
        "test_swap_directory.py::test_the_run_directory_is_private_and_its_arena_has_no_name",
        "test_swap_directory.py::test_planted_links_and_foreign_directories_are_refused",
    ),
    17: (
        "test_tier_faults.py::test_a_buffer_changed_while_it_is_written_is_found",
        "test_activations.py::test_input_changed_after_the_block_raises",
        "test_optimizer_gradients.py::test_gradients_changed_under_an_update_are_refused",
        "test_optimizer_refusals.py::test_a_weight_changed_under_an_update_is_refused",
    ),
    18: (
        "faults/test_interruptions.py::test_an_exception_in_backward_costs_that_pass_alone",
        "faults/test_interruptions.py::test_ctrl_c_at_any_moment_leaves_whole_weights_or_an_error",
        "faults/test_interruptions.py::test_a_forward_that_is_given_up_holds_nothing",
        "test_activations.py::test_a_forward_that_raises_gives_its_slot_back",
        "test_pipeline.py::test_every_slot_is_freed_where_every_copy_has_failed",
    ),
    19: (
        "test_activations.py::test_bit_equal_and_nothing_left",
        "test_activations.py::test_backward_twice_over_one_graph",
        "test_activations.py::test_one_copy_per_storage",
        "test_activations.py::test_two_forwards_before_backward_and_dropped_graphs",
        "test_gradients.py::test_a_gradient_with_a_graph_is_refused",
    ),
    20: (
        "test_optimizer_gradients.py::test_nonfinite_gradients",
        "test_optimizer_gradients.py::test_nonfinite_ignored_is_plain_pytorch",
        "test_optimizer_gradients.py::test_grad_scaler",
        "test_optimizer_gradients.py::test_gradients_that_are_not_cleared_accumulate_over_steps",
        "test_optimizer_gradients.py::test_clipping_twice_and_changing_after_clipping_with_masters",
        "test_gradients.py::test_accumulation_is_bit_equal",
    ),
    21: (
        "faults/test_optimized_python.py::test_all_of_them_under_python_o",
        "test_swap_directory.py::"
        "test_exit_without_close_leaves_nothing_and_optimized_python_moves_every_byte",
        "test_io.py::test_interpreter_exits_with_a_transfer_stuck",
    ),
    22: (
        "faults/test_limits.py::test_no_locked_memory_is_needed",
        "faults/test_limits.py::test_no_system_call_is_needed_that_containers_forbid",
        "faults/test_limits.py::test_a_kernel_that_cannot_exchange_names_says_so_and_keeps_the_old_checkpoint",
        "faults/test_limits.py::test_too_few_descriptors_are_an_error_at_the_start_that_leaves_nothing",
        "faults/test_limits.py::test_too_little_address_space_is_a_typed_error",
        "faults/test_limits.py::test_threads_that_cannot_be_started_are_a_typed_error_and_the_others_end",
        "faults/test_limits.py::test_a_file_system_on_top_of_another",
        "faults/test_broken_devices.py::test_a_read_only_disk_is_refused_by_name",
        "test_swap_directory.py::test_tmpfs_is_refused_by_name",
    ),
    23: (
        "faults/test_broken_devices.py::test_a_disk_that_is_unmounted_under_a_run_serves_it_to_its_end",
        "faults/test_broken_devices.py::test_a_cleaner_that_removes_the_swap_directory_stops_nobody",
        "faults/test_broken_devices.py::test_a_clock_that_is_set_back_hides_no_checkpoint",
        "faults/test_broken_devices.py::test_no_deadline_looks_at_the_wall_clock",
    ),
    24: (
        "test_snapshot_files.py::test_differences_are_listed_and_nothing_is_changed",
        "test_snapshot_files.py::test_weights_that_differ",
        "test_manifest.py::test_a_damaged_missing_or_foreign_table_is_refused_and_left",
    ),
}
"""By row the tests of it, files as of tests/offload."""
