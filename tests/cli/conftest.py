"""Real files made by script, a saved model, and the command line run in this process."""

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

import meditok
from meditok.cli import jobs, run


@pytest.fixture(autouse=True)
def key_file(tmp_path_factory, monkeypatch):
    """A key of this test's own, so that the user's is neither made nor read."""
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_bytes(b"a key for tests")
    path.chmod(0o600)
    monkeypatch.setenv("MEDITOK_KEY_FILE", str(path))
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """The tiny preset with random weights, saved as users save models."""
    folder = tmp_path_factory.mktemp("model")
    meditok.build("tiny", seed=0).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def load_once():
    """load_model of the commands, which loads no model twice: they change none, and fresh processes load theirs."""
    return functools.cache(jobs.load_model)


@pytest.fixture
def cli(capsys, model_dir, load_once, monkeypatch):
    """cli(*arguments) -> (exit code, stdout, stderr), with the saved model and 64 pixels unless given."""
    monkeypatch.setattr(jobs, "load_model", load_once)

    def call(*arguments):
        arguments = [str(a) for a in arguments]
        if arguments[0] in ("tokenize", "reconstruct", "detokenize", "demo") and "--model" not in arguments:
            arguments += ["--model", model_dir]
        if arguments[0] in ("tokenize", "reconstruct") and "--size" not in arguments:
            arguments += ["--size", "64"]
        code = run(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def process():
    """process(*arguments, **environment) -> CompletedProcess of a fresh `python -m meditok`."""
    import os

    root = str(Path(meditok.__file__).parents[1])

    def call(*arguments, code=None, **environment):
        start = ["-c", code] if code else ["-m", "meditok", *map(str, arguments)]
        path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, *start],
            capture_output=True,
            timeout=300,
            env=os.environ | {"PYTHONPATH": path} | environment,
        )

    return call


class PatchModel:
    """Stands in for a trained model: a token is the mean of its patch, so pictures come back as mosaics."""

    config = SimpleNamespace(
        name="patch",
        image_size=256,
        num_codebooks=2,
        codebook_size=4096,
        licence="none",
        intended_use="tests",
    )
    hash, codebook_hash, precision, device = "1" * 64, "2" * 64, "fp32", torch.device("cpu")

    def parameters(self):
        return iter(())

    def tokenize(self, images, *, stable=False):
        means = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 16).flatten(1)
        ids = ((means + 1) / 2 * 4095).round().long()
        return torch.stack([ids, torch.zeros_like(ids)], 1)

    def detokenize(self, tokens, grid, *, stable=False):
        values = tokens[:, 0].float() / 4095 * 2 - 1
        picture = values.reshape(len(tokens), 1, *grid)
        return torch.nn.functional.interpolate(picture, scale_factor=16, mode="nearest").expand(-1, 3, -1, -1)


@pytest.fixture
def patch_model(monkeypatch):
    """Commands load the patch model, whatever they are told."""
    model = PatchModel()
    monkeypatch.setattr("meditok.cli.jobs.load_model", lambda *_: model)
    return model


def write_ct(path, pixels, position=(0.0, 0.0, 0.0), series="1.2.3", spacing=(1.0, 1.0), thickness=2.0, text=None):
    """One CT slice; `pixels` (rows, columns) in HU; `text` goes into every text tag a study usually fills."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = "1.2.9", series, "CT"
    data.InstanceNumber = int(position[2])
    data.ImagePositionPatient, data.ImageOrientationPatient = list(position), [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness = list(spacing), thickness
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    if text:
        for keyword in (
            "PatientName",
            "PatientID",
            "InstitutionName",
            "StudyDescription",
            "SeriesDescription",
            "ReferringPhysicianName",
            "OperatorsName",
            "ProtocolName",
            "AccessionNumber",
            "StationName",
            "ImageComments",
            "BodyPartExamined",
            "PatientComments",
            "StudyID",
            "ManufacturerModelName",
            "WindowCenterWidthExplanation",
            "RescaleType",
            "DerivationDescription",
            "KVP",
        ):
            if keyword == "KVP":
                continue
            value = (
                text.upper()[:16]
                if keyword in ("BodyPartExamined", "RescaleType", "AccessionNumber", "StudyID")
                else text
            )
            setattr(data, keyword, value)
        data.RescaleType = "HU"
    data.PixelData = (pixels + 1024).astype("<u2").tobytes()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data, enforce_file_format=True)


def write_ct_series(folder, volume, missing=(), **options):
    """A series of CT slices from HU values (columns, rows, slices); returns its RAS affine."""
    for k in range(volume.shape[2]):
        if k not in missing:
            write_ct(
                Path(folder) / f"slice{k:02d}.dcm",
                volume[:, :, k].T,
                (-10.0, -20.0, 5.0 + 2.0 * k),
                **options,
            )
    return np.array([[-1, 0, 0, 10], [0, -1, 0, 20], [0, 0, 2, 5], [0, 0, 0, 1]], dtype=float)


def write_nifti(path, volume, affine):
    """A NIfTI volume without anything but its grid."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)


def noise(shape, high=256, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


@pytest.fixture
def make():
    """The file makers above, as attributes."""
    return SimpleNamespace(ct=write_ct, ct_series=write_ct_series, nifti=write_nifti, noise=noise)


@pytest.fixture
def pictures(tmp_path):
    """A folder with a PNG of 16 bits, a JPEG, a colour PNG in a subfolder and a text file."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(noise((50, 80), 65536, 1, np.uint16)).save(folder / "deep.png")
    Image.fromarray(noise((40, 40, 3), seed=2)).save(folder / "photo.jpg", quality=90)
    Image.fromarray(noise((64, 33, 3), seed=3)).save(folder / "sub" / "photo.png")
    (folder / "notes.txt").write_text("no picture")
    return folder
