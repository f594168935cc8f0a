"""The faults of `make faults`, a few cases each; and that their judge can say no."""

import os
import shutil

import pytest

from benchmarks import faults

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The undisturbed run."""
    return faults.undisturbed(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def ref(undisturbed, tmp_path):
    """The same, with a place of this test's own for disturbed runs."""
    return undisturbed._replace(root=tmp_path)


def outcomes(cases):
    """The outcomes of Cases; one that is neither fails here, with its reason."""
    cases = list(cases)
    assert not [case for case in cases if case.outcome == "neither"]
    return [case.outcome for case in cases]


def test_the_undisturbed_run_goes_through_every_phase(ref):
    assert {phase for _, phase in ref.times} == {*faults.PHASES, "end"}
    assert len(ref.files) == 2 * len(faults.ARRAYS) + 1 and "lira" in ref.files["results.csv"]


def test_after_kill_9_the_result_is_the_same(ref):
    cases = list(faults.kills(ref, 3))
    assert outcomes(cases) == ["same_result"] * 3 and {case.note for case in cases} <= set(faults.PHASES)


def test_a_full_disk_is_one_clear_error_and_once_freed_the_result_is_the_same(ref):
    assert outcomes(faults.full_disks(ref, faults.FULL[2:3])) == ["clear_error", "same_result"]


def test_a_read_only_store_is_one_clear_error(ref):
    cases = list(faults.read_only_stores(ref, ("begun",)))
    if not cases:
        pytest.skip("this user can write anywhere, and may not mount")
    assert outcomes(cases) == ["clear_error", "same_result"]


def test_damaged_arrays_are_trained_again(ref):
    cases = list(faults.arrays(ref, ("logits",)))
    assert outcomes(cases) == ["same_result"] * 3 and len({case.fault for case in cases}) == 3


@pytest.mark.parametrize("name, file", [("no status", "done/00005.json"), ("a list", "recipe.json")])
def test_damaged_flags_and_recipes_are_made_anew(ref, name, file):
    assert outcomes(faults.flags(ref, (name,), file)) == ["same_result"]


def test_a_clock_that_jumps_changes_nothing(ref):
    assert outcomes(faults.clocks(ref, ())) == ["same_result"]


def test_two_writers_and_a_lost_one(ref):
    assert outcomes(faults.two_writers(ref, 1)) == ["same_result"] * 2
    assert outcomes(faults.lost_workers(ref, 1)) == ["same_result"]


ERROR = "error: store='x' can't be written (full): give a writable folder\n"


@pytest.mark.parametrize(
    "status, said, outcome",
    [(2, ERROR, "clear_error"), (1, f"a warning\n{ERROR}", "clear_error"), (0, "", "neither"),
     (2, ERROR + ERROR, "neither"), (2, "", "neither"), (2, "error: it did not work\n", "neither"),
     (1, f"Traceback (most recent call last):\n{ERROR}", "neither"), (-9, "", "neither"),
     (1, "error: 01_phenomenon failed, see out/01_phenomenon.ipynb: DeadKernelError: Kernel died\n", "clear_error")],
)  # fmt: skip
def test_the_judge_can_say_no(tmp_path, status, said, outcome):
    assert faults.judged("fault", tmp_path, {"store/x/logits.npy": "0"}, status, said).outcome == outcome


def test_the_fingerprint_sees_a_bit_and_a_digit_but_no_time(ref, tmp_path):
    folder = shutil.copytree(ref.whole, tmp_path / "copy")
    results, member = folder / "out" / "results.csv", faults.stores(folder)[0] / "member.npy"
    head, *lines = results.read_text().splitlines()
    results.write_text("\n".join([f"{head},seconds", *(f"{line},1.5" for line in lines)]))
    assert "seconds" in head or faults.fingerprint(folder) == ref.files
    member.write_bytes(faults.flipped(member.read_bytes(), 200, 0))
    results.write_text(results.read_text().replace("0.5", "0.6", 1))
    left = faults.fingerprint(folder)
    assert {name for name in left if left[name] != ref.files[name]} == {"results.csv", str(member.relative_to(folder))}


def test_the_table_counts_and_says_what_was_neither():
    cases = [faults.Case("kill -9", "same_result", "training")] * 2 + [faults.Case("kill -9", "neither", "differ: x")]
    (row,) = faults.table(cases).itertuples()
    assert (row.cases, row.same_result, row.clear_error, row.neither) == (3, 2, 0, 1)
    assert row.note == "differ: x: 1, training: 2"
