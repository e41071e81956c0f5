"""How each block of commands is run: by tests/docs/test_commands.py, by another test, or why not here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """As it stands on its page, after what stands above it, in tests/docs/test_commands.py."""


@dataclass(frozen=True, slots=True)
class By:
    """What it runs is run by this test, `file::function`: with less to do, or as a part of more."""

    test: str


@dataclass(frozen=True, slots=True)
class Needs:
    """It cannot be run here, for want of this. Its words are those that its program takes, all the same."""

    what: str


Way = Run | By | Needs
RUN = Run()
DEMO = By("tests/docs/test_commands.py::test_the_demo_runs")
GPU, GPUS, TPU = Needs("an NVIDIA GPU"), Needs("two NVIDIA GPUs"), Needs("a TPU")
BACKENDS = By(
    "tests/bench/test_backends.py::test_every_case_is_measured_here_and_beside_it_what_is_not_here_is_marked"
)
SERVE = By("tests/bench/load/test_serve.py::test_a_run_reports_what_was_asked_for")
GOODPUT = By("tests/bench/load/test_goodput.py::test_every_policy_serves_the_same_requests")
SIMULATE = By("tests/bench/simulate/test_policies.py::test_it_runs_as_a_module")

WAYS: dict[str, list[Way]] = {
    "README.md": [DEMO, RUN, RUN, RUN, GPU, TPU, GPUS],
    "docs/benchmarks.md": [SERVE, SERVE, GOODPUT, SIMULATE],
    "docs/branching-models.md": [
        By("tests/serve/test_branching_models.py::test_branches_fork_at_the_tags_and_join_and_the_turn_ends"),
        Needs("the weights of such a model"),
    ],
    "docs/client.md": [RUN],
    "docs/openai.md": [RUN, RUN],
    "docs/operating.md": [
        RUN,
        Needs("Docker"),
        By("tests/serve/test_health_command.py::test_with_certificates_it_needs_them"),
        Needs("a cluster of Kubernetes"),
    ],
    "docs/quick-start.md": [DEMO, *[RUN] * 9],
    "docs/replicas.md": [
        By("tests/outside/test_gateway.py::test_killing_a_server_loses_no_request_that_had_not_started"),
        Needs("Ray"),
    ],
    "docs/notebook/backends.md": [BACKENDS, BACKENDS],
    "docs/notebook/engine.md": [
        By("tests/bench/device/test_engine.py::test_the_engine_is_timed_against_its_own_executable")
    ],
    "docs/notebook/measures.md": [
        SERVE,
        GOODPUT,
        SIMULATE,
        By("tests/bench/simulate/test_maps.py::test_a_map_is_simulated_written_and_drawn"),
        BACKENDS,
        By("tests/tpu/test_aot.py::test_the_command_says_what_a_step_takes"),
        By("tests/bench/host/test_serving.py::test_a_small_load_is_measured_over_both_processes"),
        By(
            "tests/bench/device/test_predictor.py::test_a_server_is_calibrated_and_its_predictions_are_measured"
        ),
        By("tests/bench/load/test_workload.py::test_a_file_gives_the_workload_back"),
    ],
    "docs/results.md": [
        By("tests/bench/test_headline.py::test_what_a_folder_lacks_is_made_and_nothing_twice"),
        By("tests/bench/simulate/test_maps.py::test_steps_are_as_late_as_those_of_a_run"),
    ],
    "docs/tenants.md": [RUN] * 3,
    "docs/tls.md": [RUN] * 7,
    "docs/tpu.md": [TPU] * 5,
}
"""Of each page, in the order of its blocks."""
