"""Planes, affines and the way a slice is shown.

World coordinates are RAS+ millimetres. A slice of a volume is shown as a radiologist sees it: patient right
at image left, anterior up (axial), superior up (coronal, sagittal; sagittal with anterior at image left).
Nothing is resampled: showing is a transposition and flips, which `from_display` undoes exactly.
"""

from __future__ import annotations

import numpy as np
import torch

from meditok.data.image import Geometry
from meditok.errors import GeometryError

# Plane -> world axis of the normal, world axis down the rows, world axis along the columns. Both in-plane
# coordinates fall (R to L, A to P, S to I) as the row or column index rises.
_PLANES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}

# DICOM patient coordinates are LPS; both first axes point the other way.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def affine_matrix(geometry: Geometry) -> np.ndarray:
    """The 4 x 4 float64 matrix of a geometry; GeometryError if it has none."""
    if geometry.affine is None:
        raise GeometryError("this picture has no affine: it does not come from a volume")
    return np.asarray(geometry.affine, dtype=np.float64).reshape(4, 4)


def check_affine(affine: np.ndarray, where: str) -> np.ndarray:
    """The affine as float64, or GeometryError if it is not finite or is singular."""
    affine = np.asarray(affine, dtype=np.float64)
    columns = affine[:3, :3]
    lengths = np.linalg.norm(columns, axis=0) if np.isfinite(affine).all() else np.zeros(3)
    if lengths.min() <= 0 or abs(np.linalg.det(columns / lengths)) < 1e-6:
        raise GeometryError(
            f"{where}: the affine is singular or not finite, so slices have no place; correct the header"
        )
    return affine


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Millimetres per voxel along i, j, k."""
    return tuple(float(length) for length in np.linalg.norm(np.asarray(affine)[:3, :3], axis=0))


def slice_axis(affine: np.ndarray, plane: str) -> int:
    """The voxel axis closest to the normal of `plane`; 2 for the native plane."""
    if plane == "native":
        return 2
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return int(np.argmax(np.abs(directions[_PLANES[plane][0]])))


def _arrangement(geometry: Geometry) -> tuple[bool, bool, bool]:
    """(transpose, flip rows, flip columns) that turn volume.take(k, axis) into what is shown.

    The 2-D slice keeps its two voxel axes a < b in order, shape (n_a, n_b).
    """
    if geometry.axis < 0:
        return False, False, False
    if geometry.plane == "native":
        return True, False, False  # shown[r, c] = volume[c, r, k]
    affine = affine_matrix(geometry)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    first, second = (axis for axis in range(3) if axis != geometry.axis)
    _, row_world, column_world = _PLANES[geometry.plane]
    straight = abs(directions[row_world, first]) + abs(directions[column_world, second])
    crossed = abs(directions[row_world, second]) + abs(directions[column_world, first])
    transpose = bool(crossed >= straight)
    row_axis, column_axis = (second, first) if transpose else (first, second)
    return (
        transpose,
        bool(directions[row_world, row_axis] > 0),
        bool(directions[column_world, column_axis] > 0),
    )


def _flip(array, dims: tuple[int, ...]):
    if not dims:
        return array
    return torch.flip(array, dims) if isinstance(array, torch.Tensor) else np.flip(array, dims)


def to_display(slice2d, geometry: Geometry):
    """A slice as it is shown: (..., n_a, n_b) -> (..., H, W), numpy or torch, a view where possible."""
    transpose, flip_rows, flip_columns = _arrangement(geometry)
    shown = slice2d.swapaxes(-1, -2) if transpose else slice2d
    return _flip(shown, tuple(dim for dim, flip in ((-2, flip_rows), (-1, flip_columns)) if flip))


def from_display(picture, geometry: Geometry):
    """Inverse of `to_display`: (..., H, W) -> (..., n_a, n_b) in the order of the voxel axes."""
    transpose, flip_rows, flip_columns = _arrangement(geometry)
    stored = _flip(picture, tuple(dim for dim, flip in ((-2, flip_rows), (-1, flip_columns)) if flip))
    return stored.swapaxes(-1, -2) if transpose else stored


def slice_position(geometry: Geometry, index: int) -> float:
    """Millimetres of slice `index` along the unit normal of the slice plane, rising with the index."""
    affine = affine_matrix(geometry)
    first, second = (axis for axis in range(3) if axis != geometry.axis)
    normal = np.cross(affine[:3, first], affine[:3, second])
    normal /= np.linalg.norm(normal)
    if normal @ affine[:3, geometry.axis] < 0:
        normal = -normal
    voxel = np.zeros(4)
    voxel[3], voxel[geometry.axis] = 1.0, index
    return float(normal @ (affine @ voxel)[:3])


def volume_geometry(shape: tuple[int, int, int], affine: np.ndarray, plane: str) -> Geometry:
    """Geometry of the slices of a volume with `shape` voxels along i, j, k, cut along `plane`."""
    return Geometry(
        original_shape=tuple(int(n) for n in shape),
        axis=slice_axis(affine, plane),
        plane=plane,
        spacing=spacing_of(affine),
        affine=tuple(float(value) for value in affine.reshape(-1)),
    )


def displayed_size(geometry: Geometry) -> tuple[int, int]:
    """(H, W) of the picture at native size."""
    if geometry.axis < 0:
        return int(geometry.original_shape[0]), int(geometry.original_shape[1])
    sizes = [n for axis, n in enumerate(geometry.original_shape[:3]) if axis != geometry.axis]
    return tuple(reversed(sizes)) if _arrangement(geometry)[0] else tuple(sizes)
