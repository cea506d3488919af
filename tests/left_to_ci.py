"""Tests that `make test` leaves to continuous integration, which runs them after it (`make rest`).

`make test` is to end within five minutes on two cores. These take most for what they show beside the others: whole
programs from new interpreters, layouts beyond a sample, and the same numbers of the kernels at more gates and cuts.
"""

LEFT_TO_CI = (
    "tests/analysis/test_volume.py::test_counted_bytes_are_the_derived_ones[4]",
    "tests/cli/test_check.py::test_check[arguments0",
    "tests/cli/test_elastic.py::test_a_killed_process_costs_only_time[1]",
    "tests/cli/test_launch.py::test_every_layout_ends_with_score_sample_and_curve[sp-True]",
    "tests/distributed/test_exits.py::test_programs_end_with_exit_code_0",
    "tests/docs/test_blocks.py::test_a_quickstart_works_from_an_empty_folder[resume]",
    "tests/docs/test_blocks.py::test_a_quickstart_works_from_an_empty_folder[train]",
    "tests/generate/test_across_ranks.py",
    "tests/kernels/triton/test_decay.py::test_gates_per_",
    "tests/kernels/triton/test_documents.py",
    "tests/kernels/triton/test_gate_gradient.py::test_every_head",
    "tests/kernels/triton/test_gathered.py",
    "tests/kernels/triton/test_operator.py::test_two_ranks_equal_one[sample]",
    "tests/train/test_layouts.py::test_what_processes_keep_does_not_change_the_loss_curve",
    "tests/train/test_packed_training.py::test_every_layout_has_the_same_loss_curve",
    "tests/train/test_recomputation.py::test_compiled_blocks_exchange_inside_the_graph[1]",
    "tests/train/test_recomputation.py::test_compiled_blocks_keep_no_inputs",
    "tests/train/test_recomputation.py::test_every_family_compiles_on_one_process[gla",
    "tests/train/test_recomputation.py::test_every_family_compiles_over_ranks[mamba2",
    "tests/train/test_reshard.py::test_every_layout_goes_on_from_the_others_checkpoints[names0-2-5-20]",
)
