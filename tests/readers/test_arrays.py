"""Arrays given as images: shapes, dtypes, ranges, strides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meditok.data import to_pixels
from meditok.errors import DtypeError, IntensityError, NonFiniteError, ShapeError
from tests.readers.bad_pictures import noise


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((8, 9), 1),
        ((8, 9, 3), 1),
        ((3, 8, 9), 1),
        ((2, 8, 9, 3), 2),
        ((2, 3, 8, 9), 2),
        ((1, 8, 9), 1),
        ((0, 3, 8, 9), 0),
    ],
)
def test_shapes_that_are_images(shape, count):
    """Each becomes a list of float32 (3, 8, 9)."""
    found = to_pixels(noise(*shape))
    assert len(found) == count and all(pixels.shape == (3, 8, 9) and pixels.dtype == torch.float32 for pixels in found)


@pytest.mark.parametrize(
    "shape", [(8,), (8, 9, 2), (2, 8, 9), (5, 8, 9), (2, 2, 8, 9), (1, 2, 3, 8, 9), (8, 0), (3, 9, 3)]
)
def test_other_ranks_and_channel_counts_are_refused(shape):
    """With the shape in the message and the layouts that would do."""
    with pytest.raises(ShapeError, match="layout="):
        to_pixels(noise(*shape))


def test_a_stack_of_slices_needs_its_layout():
    """layout="DHW" gives one picture a slice; an ambiguous shape is settled by the layout."""
    assert len(to_pixels(noise(5, 8, 9), layout="DHW")) == 5
    assert to_pixels(noise(3, 9, 3), layout="HWC")[0].shape == (3, 3, 9)
    assert to_pixels(noise(3, 9, 3), layout="CHW")[0].shape == (3, 9, 3)


def test_dtypes_and_ranges():
    """uint8 and uint16 by their type, floats in [-1, 1]; the rest is refused with the values seen."""
    assert to_pixels(np.array([[0, 255]], np.uint8))[0][0].tolist() == [[-1, 1]]
    assert to_pixels(np.array([[0, 65535]], np.uint16))[0][0].tolist() == [[-1, 1]]
    assert to_pixels(np.array([[0, 65535]], ">u2"))[0][0].tolist() == [[-1, 1]]
    for dtype in (np.float16, np.float32, np.float64, ">f4"):
        assert to_pixels(np.array([[-1, 0.5]], dtype))[0][0].tolist() == [[-1, 0.5]]
    assert to_pixels(torch.tensor([[-1, 0.5]], dtype=torch.bfloat16))[0][0].tolist() == [[-1, 0.5]]
    for array, seen in (
        (np.array([[0, 300]]), "0..300"),
        (np.array([[0.0, 255.0]]), "0..255"),
        (np.array([[-1.5, 0.0]], np.float32), "-1.5..0"),
        (np.array([[True, False]]), "bool"),
        (np.array([[1j, 0]]), "complex"),
    ):
        with pytest.raises(DtypeError, match=seen):
            to_pixels(array)
    with pytest.warns(UserWarning, match="look like 0..1"):
        to_pixels(np.array([[0.0, 0.9]]))


def test_nonfinite_values_are_counted():
    """NaN and infinity."""
    with pytest.raises(NonFiniteError, match="2 of 4"):
        to_pixels(np.array([[np.nan, np.inf], [0, 0]]))


def test_alpha_is_dropped_laid_over_black_or_refused():
    """Opaque, half, and wholly transparent."""
    colour = noise(4, 4, 3)
    opaque = np.dstack([colour, np.full((4, 4), 255, np.uint8)])
    assert torch.equal(to_pixels(opaque)[0], to_pixels(colour)[0])
    with pytest.raises(IntensityError):
        to_pixels(np.zeros((4, 4, 4), np.uint8), layout="HWC")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_strides_give_the_same_pixels(data):
    """Reversed, stepped, transposed, expanded, offset by one element, read-only."""
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(5, 9))
    base = noise(height * 2 + 1, width * 2 + 1)
    rows = data.draw(st.sampled_from([1, 2, -1, -2]))
    view = base[::rows, 1::2][:height]
    if data.draw(st.booleans()):
        view = np.broadcast_to(view[:1], view.shape)
    view.flags.writeable = False if data.draw(st.booleans()) else view.flags.writeable
    expected = to_pixels(np.ascontiguousarray(view))[0]
    assert torch.equal(to_pixels(view)[0], expected)
    assert torch.equal(to_pixels(torch.from_numpy(view.copy()).T.T)[0], expected)
