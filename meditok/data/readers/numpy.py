"""NumPy .npy files under the array rules of `meditok.data.arrays`; never unpickles.

The header is checked before anything is read, and the array is mapped, so that one frame of a large stack
costs the memory of one frame. With modality ct, signed integers are HU and unsigned ones need ct_bias.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.lib import format as npy_format

from meditok.data.arrays import flatten_alpha, guess_layout, range_of_array
from meditok.data.image import Geometry, MedicalImage
from meditok.data.options import ReadOptions
from meditok.data.readers.blob import Blob
from meditok.data.readers.common import choose_window, replace_nonfinite, to_tensor
from meditok.data.windows import ValueStatistics, Window
from meditok.errors import CorruptImageError, DtypeError, IntensityError, UnsafeFileError


class ArrayFile:
    """One .npy file; `frames` is the length of its batch axis, 1 without one."""

    def __init__(self, blob: Blob, options: ReadOptions):
        self.blob, self.options = blob, options
        self.where = blob.label
        self.modality = options.modality or "other"
        self.syntax = "NPY"
        self._array = self._mapped()
        self.layout = guess_layout(self._array.shape, options.layout, self.where)
        frames = self._array.shape[0] if self.layout in ("DHW", "BHWC", "BCHW") else 1
        options.limits.check_frames(frames, self.where)
        rows, columns = (-3, -2) if self.layout.endswith("C") else (-2, -1)
        self.height, self.width = int(self._array.shape[rows]), int(self._array.shape[columns])
        options.limits.check_pixels(self.width, self.height, self.where)
        self.frames = int(frames)

    def _mapped(self) -> np.ndarray:
        head = io.BytesIO(self.blob.read(0, 65536))
        try:
            version = npy_format.read_magic(head)
            readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
            if version not in readers:
                raise ValueError("version")
            shape, fortran, dtype = readers[version](head)
            if min(shape, default=0) < 0:
                raise ValueError("shape")
        except Exception as error:  # the header is a Python literal: tokenizer, parser and dtype each raise their own
            raise CorruptImageError(f"{self.where}: the .npy header cannot be read; save the array again") from error
        if dtype.hasobject:
            raise UnsafeFileError(f"{self.where}: holds pickled Python objects, which may run code; save plain numbers")
        if dtype.kind not in "uifb":
            raise DtypeError(f"{self.where}: dtype {dtype}; give uint8, uint16 or floats in [-1, 1]")
        expected = dtype.itemsize * int(np.prod(shape, dtype=object))
        held = self.blob.size - head.tell()
        if held < expected:
            raise CorruptImageError(f"{self.where}: {held} bytes of data of {expected} expected; the file is cut")
        order = "F" if fortran else "C"
        if self.blob.is_file and expected:
            return np.memmap(self.blob.path, dtype=dtype, mode="r", offset=head.tell(), shape=shape, order=order)
        data = self.blob.read(head.tell(), expected)
        return np.frombuffer(data, dtype=dtype).reshape(shape, order=order)

    def image(self, index: int) -> MedicalImage:
        """Frame `index` as a MedicalImage."""
        array = self._array if self.layout in ("HW", "HWC", "CHW") else self._array[index]
        values = np.array(array)  # out of the map
        if self.layout.endswith("CHW"):
            values = values.transpose(1, 2, 0)
        values, steps = replace_nonfinite(values, self.options.nonfinite, f"{self.where} frame {index}")
        ct = self.modality == "ct" and not self.options.display and values.dtype.kind in "ui"
        values, own = self._hounsfield(values, steps) if ct else (values, None)
        if own is None:
            own = range_of_array(values, self.where)
        unit = "HU" if ct else {1.0: "", 255.0: "display"}.get(own.high, "stored")

        def statistics() -> ValueStatistics:
            found = ValueStatistics()
            found.add(values)
            return found

        window = choose_window(
            self.options, self.where, ct=ct, auto=lambda: own, full=lambda: own, statistics=statistics
        )
        steps.append(window.label)
        pixels = window.apply(values)
        if pixels.ndim == 3 and pixels.shape[2] == 4:
            pixels = flatten_alpha(pixels.transpose(2, 0, 1)[None], self.where)[0].transpose(1, 2, 0)
            steps.append("alpha laid over black")
        return MedicalImage(
            pixels=to_tensor(pixels),
            low=window.low,
            high=window.high,
            unit=unit,
            modality=self.modality,
            geometry=Geometry(original_shape=tuple(pixels.shape[:2])),
            steps=steps,
            window=window.name,
            channels=3 if pixels.ndim == 3 else 1,
            source=self.where,
            frame=index,
        )

    def _hounsfield(self, values: np.ndarray, steps: list[str]) -> tuple[np.ndarray, Window]:
        if values.ndim == 3 or values.dtype.itemsize == 1:
            raise IntensityError(
                f"{self.where}: ct needs HU; got {values.dtype} {values.shape}; give 16-bit grey values"
            )
        bias = self.options.ct_bias
        if bias is None and values.dtype.kind == "u":
            raise IntensityError(
                f"{self.where}: ct needs HU; got {values.dtype} without a rescale; pass --ct-bias "
                "1024 if 1024 was added"
            )
        if bias:
            steps.append(f"ct bias {bias:g} subtracted")
            values = values.astype(np.float64) - bias
        return values, Window(float(values.min()), float(values.max()), "full")
