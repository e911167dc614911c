"""`meditok detokenize` and `reconstruct`: the right pixels at the right place, from the token file alone."""

import json

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import meditok
from meditok.tokens import Tokens


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_decoding_in_a_fresh_process_equals_reconstruct_byte_for_byte(
    cli, make, pictures, tmp_path, model_dir, process
):
    make.ct_series(pictures / "ct", make.noise((40, 30, 3), 2000, dtype=np.int16) - 1000)
    assert cli("reconstruct", pictures, "-o", tmp_path / "a")[0] == 0
    assert cli("tokenize", pictures, "-o", tmp_path / "t.parquet")[0] == 0
    done = process("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "b", "--model", model_dir, "--batch-size", 1)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert sorted(p.suffix for p in (tmp_path / "b").iterdir()) == [".gz", ".png", ".png", ".png"]


def test_a_mixed_folder_comes_back_with_every_size_and_place_right(cli, make, pictures, tmp_path, patch_model):
    bright = make.noise((64, 48, 4), 1, dtype=np.int16) - 1000
    bright[:16, :12, 0] = 900  # one marked corner: first columns, first rows, first slice
    affine = make.ct_series(pictures / "ct", bright)
    volume = np.zeros((48, 64, 5), np.int16)
    volume[-12:, :16, -1] = 800
    turned = np.array([[0, -2, 0, 30], [1.5, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]], dtype=float)
    make.nifti(pictures / "mr" / "scan.nii.gz", volume, turned)
    corner = np.zeros((50, 80), np.uint16)
    corner[:20, 60:] = 65535
    Image.fromarray(corner).save(pictures / "deep.png")

    code, _, _ = cli("tokenize", pictures, "-o", tmp_path / "t.parquet", "--keep-names", "--size", 256)
    assert code == 0
    code, _, err = cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out")
    assert code == 0 and "3 pictures and 2 volumes" in err

    back = nibabel.load(tmp_path / "out" / "mr" / "scan.nii.gz.nii.gz")
    assert back.shape == volume.shape and np.allclose(back.affine, turned)
    values = back.get_fdata()
    assert values[-6, 8, -1] > 0.8 * values.max() and values[6, 8, -1] < 0.2 * values.max()
    assert values[-6, 8, 0] < 0.2 * values.max()

    ct = next(p for p in (tmp_path / "out").glob("*.nii.gz"))
    back = nibabel.load(ct)
    assert back.shape == bright.shape and np.allclose(back.affine, affine) and back.get_data_dtype() == np.int16
    values = back.get_fdata()
    assert values[8, 6, 0] > 850 and values[-8, 6, 0] < -950 and values[8, -6, 0] < -950 and values[8, 6, -1] < -950

    deep = np.asarray(Image.open(tmp_path / "out" / "deep.png.png"))
    assert deep.shape == (50, 80) and deep[8, 72] > 240 and deep[8, 8] < 15 and deep[42, 72] < 15
    assert Image.open(tmp_path / "out" / "photo.jpg.png").size == (40, 40)
    assert Image.open(tmp_path / "out" / "sub" / "photo.png.png").size == (33, 64)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_marked_corner_stays_at_its_world_point_in_all_48_axis_orders(cli, make, tmp_path, patch_model, plane):
    import itertools

    inside = tmp_path / "in"
    worlds = {}
    for number, (order, signs) in enumerate(
        itertools.product(itertools.permutations(range(3)), itertools.product([1, -1], repeat=3))
    ):
        volume = np.zeros((16, 16, 16), np.int16)
        volume[:4, :4, :4] = 500  # a patch
        affine = np.zeros((4, 4))
        for axis in range(3):
            affine[order[axis], axis] = signs[axis] * (1 + axis)
        affine[:, 3] = [3, 5, 7, 1]
        name = f"v{number:02d}.nii"
        make.nifti(inside / name, volume, affine)
        worlds[name] = affine
    code, _, _ = cli(
        "tokenize",
        inside,
        "-o",
        tmp_path / "t.parquet",
        "--keep-names",
        "--modality",
        "mr",
        "--plane",
        plane,
        "--size",
        64,
    )
    assert code == 0
    assert cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out")[0] == 0
    for name, affine in worlds.items():
        back = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
        assert np.allclose(back.affine, affine), name
        assert (back.get_fdata()[1:3, 1:3, 1:3] > 400).all() and (back.get_fdata()[8:, 8:, 8:] < 100).all(), name


def test_a_gap_divides_a_series_into_runs_that_lie_right(cli, make, tmp_path, patch_model):
    volume = make.noise((32, 32, 7), 1000, dtype=np.int16)
    affine = make.ct_series(tmp_path / "in", volume, missing=(3, 4))
    assert cli("tokenize", tmp_path / "in", "-o", tmp_path / "t.parquet")[0] == 0
    code, _, err = cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out")
    assert code == 0 and "2 slices are missing" in err
    first, second = sorted((tmp_path / "out").iterdir())
    assert first.name.endswith("_0000-0002.nii.gz") and second.name.endswith("_0005-0006.nii.gz")
    assert nibabel.load(first).shape == (32, 32, 3) and np.allclose(nibabel.load(first).affine, affine)
    shifted = affine.copy()
    shifted[2, 3] += 5 * 2.0
    assert nibabel.load(second).shape == (32, 32, 2) and np.allclose(nibabel.load(second).affine, shifted)


def test_unevenly_spaced_slices_become_pictures_with_a_warning(cli, make, tmp_path, patch_model):
    for k, z in enumerate((0.0, 2.0, 4.2, 6.2)):
        make.ct(tmp_path / "in" / f"{k}.dcm", make.noise((32, 32), 1000, dtype=np.int16), (0, 0, z))
    assert cli("tokenize", tmp_path / "in", "-o", tmp_path / "t.parquet")[0] == 0
    code, _, err = cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out")
    assert code == 0 and "mm apart" in err
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".png"] * 4


def test_formats_and_values_are_what_was_asked_for(cli, make, tmp_path, patch_model):
    flat = np.full((2, 32, 32), 65, np.int16).transpose(1, 2, 0)
    make.ct_series(tmp_path / "in", flat)
    assert cli("tokenize", tmp_path / "in", "-o", tmp_path / "t.parquet", "--window", "soft-tissue")[0] == 0

    def decode(*options):
        out = tmp_path / "-".join(["out", *options])
        code, _, err = cli("detokenize", tmp_path / "t.parquet", "-o", out, *options)
        return code, err, sorted(out.iterdir()) if out.exists() else []

    code, err, (volume,) = decode()
    assert code == 0 and "lost" in err
    assert nibabel.load(volume).get_data_dtype() == np.int16 and (nibabel.load(volume).get_fdata() == 65).all()
    assert (nibabel.load(decode("--values", "display")[2][0]).get_fdata() == 137).all()
    code, err, pictures = decode("--as", "png")
    assert len(pictures) == 2 and (np.asarray(Image.open(pictures[0])) == 137).all() and "lost" not in err
    assert np.asarray(Image.open(decode("--as", "png16")[2][0])).max() > 35000
    array = np.load(decode("--as", "npy")[2][0])
    assert array.dtype == np.int16 and array.shape == (32, 32) and (array == 65).all()
    code, err, _ = decode("--as", "png", "--values", "native")
    assert code == 2 and "do not fit 0..255" in err


def test_sixteen_bit_values_come_back_as_sixteen_bit_values(cli, make, tmp_path, patch_model):
    halves = np.repeat(np.array([[40000, 30000]], np.uint16), 64, 0).repeat(32, 1)
    Image.fromarray(halves).save(tmp_path / "grey.png")
    np.save(tmp_path / "colour.npy", np.stack([halves] * 3, -1))
    for name in ("grey.png", "colour.npy"):
        assert cli("tokenize", tmp_path / name, "-o", tmp_path / f"{name}.parquet", "--keep-names")[0] == 0
        assert cli("detokenize", tmp_path / f"{name}.parquet", "-o", tmp_path / "out", "--as", "png16")[0] == 0
    grey = np.asarray(Image.open(tmp_path / "out" / "grey.png.png"))
    assert grey.dtype == np.uint16 and abs(int(grey[0, 0]) - 40000) < 17
    data = (tmp_path / "out" / "colour.npy.png").read_bytes()
    assert data[24:26] == b"\x10\x02"  # 16 bits, colour
    assert (np.asarray(Image.open(tmp_path / "out" / "colour.npy.png"))[:, 40:] == 30000 >> 8).all()


def test_pictures_as_nifti_are_refused(cli, pictures, tmp_path, patch_model):
    assert cli("tokenize", pictures, "-o", tmp_path / "t.parquet")[0] == 0
    code, _, err = cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out", "--as", "nifti")
    assert code == 2 and "no place in a volume" in err and not (tmp_path / "out").exists()


def test_frames_of_a_cine_are_numbered_in_a_folder_of_their_own(cli, make, tmp_path, patch_model):
    stack = [Image.fromarray(make.noise((32, 32, 3), seed=i)) for i in range(3)]
    stack[0].save(tmp_path / "cine.tif", save_all=True, append_images=stack[1:])
    assert cli("tokenize", tmp_path / "cine.tif", "-o", tmp_path / "t.parquet")[0] == 0
    assert cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out")[0] == 0
    first = Tokens.load(tmp_path / "t.parquet").rows[0].id
    assert sorted(files(tmp_path / "out")) == [f"{first}/{i:04d}.png" for i in range(3)]


@pytest.mark.parametrize("fit", ["pad", "stretch", "crop", "tile"])
def test_every_fit_comes_back_at_native_size(cli, tmp_path, patch_model, fit):
    ramp = np.linspace(0, 255, 96 * 150).reshape(96, 150).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    arguments = ["--fit", fit, "--keep-names", "--size", 64 if fit == "tile" else 256]
    assert cli("tokenize", tmp_path / "ramp.png", "-o", tmp_path / "t.parquet", *arguments)[0] == 0
    tokens = Tokens.load(tmp_path / "t.parquet")
    assert len(tokens) == (6 if fit == "tile" else 1) and (tokens.rows[0].tile is not None) == (fit == "tile")
    assert cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out")[0] == 0
    back = np.asarray(Image.open(tmp_path / "out" / "ramp.png.png")).astype(int)
    assert back.shape == ramp.shape
    assert abs(back[40:56, 60:90] - ramp[40:56, 60:90]).max() < 30


def test_another_codebook_is_refused_with_both_hashes(cli, pictures, tmp_path):
    cli("tokenize", pictures / "photo.jpg", "-o", tmp_path / "t.parquet")
    model = meditok.build("tiny", seed=0)
    with torch.no_grad():
        flat = model.quantizer.codebook.view(-1).view(torch.int32)
        flat[4711] ^= 1 << 3  # one bit of one byte
    model.save_pretrained(tmp_path / "other")
    code, _, err = cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out", "--model", tmp_path / "other")
    made = Tokens.load(tmp_path / "t.parquet").info.codebook_hash
    assert code == 3 and made in err and model.codebook_hash in err and made != model.codebook_hash
    assert not (tmp_path / "out").exists()


def test_a_bad_id_anywhere_in_the_file_stops_before_the_first_picture(cli, pictures, tmp_path):
    import pyarrow as pa

    cli("tokenize", pictures, "-o", tmp_path / "t.parquet")
    table = pq.ParquetFile(tmp_path / "t.parquet")
    header, table = table.metadata.metadata, table.read()
    ids = [list(v) for v in table.column("tokens").to_pylist()]
    ids[-1][-1] = 4096
    column = pa.array(ids, pa.list_(pa.int32()))
    changed = table.set_column(1, "tokens", column)
    pq.write_table(changed.replace_schema_metadata(header), tmp_path / "t.parquet")
    code, _, err = cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out")
    assert code == 3 and "4096" in err and not (tmp_path / "out").exists()


def test_a_picture_that_is_there_and_differs_is_not_replaced_unasked(cli, pictures, tmp_path):
    cli("tokenize", pictures / "photo.jpg", "-o", tmp_path / "t.parquet", "--keep-names")
    assert cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out")[0] == 0
    code, _, err = cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out")
    assert code == 0 and "byte for byte" in err
    (tmp_path / "out" / "photo.jpg.png").write_bytes(b"mine")
    code, _, err = cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out")
    assert code == 2 and (tmp_path / "out" / "photo.jpg.png").read_bytes() == b"mine"
    assert cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out", "--overwrite")[0] == 0


def test_a_name_that_would_leave_the_folder_is_unsafe(cli, pictures, tmp_path):
    import dataclasses

    cli("tokenize", pictures / "photo.jpg", "-o", tmp_path / "t.parquet", "--keep-names")
    tokens = Tokens.load(tmp_path / "t.parquet")
    for name in ("../evil", "/evil", "a/../../evil", "C:/evil", ".."):
        Tokens(tokens.ids, [dataclasses.replace(tokens.rows[0], id=name)], tokens.info).save(tmp_path / "e.parquet")
        assert cli("detokenize", tmp_path / "e.parquet", "-o", tmp_path / "out" / "deep")[0] == 5
    assert not (tmp_path / "out").exists() and not (tmp_path / "evil.png").exists()


def test_written_files_hold_nothing_but_the_picture(cli, make, tmp_path, patch_model):
    make.ct_series(tmp_path / "in", make.noise((32, 32, 3), 1000, dtype=np.int16))
    Image.fromarray(make.noise((32, 32))).save(tmp_path / "in" / "x.png")
    cli("reconstruct", tmp_path / "in", "-o", tmp_path / "out")
    png = Image.open(next((tmp_path / "out").glob("*.png")))
    assert not png.info
    header = nibabel.load(next((tmp_path / "out").glob("*.nii.gz"))).header
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        assert not bytes(header[field]).strip(b"\0") if field in header else True


def test_reconstruct_keeps_going_past_failures_when_told_to(cli, pictures, tmp_path):
    (pictures / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, _, _ = cli("reconstruct", pictures, "-o", tmp_path / "stop")
    assert code == 3 and not (tmp_path / "stop").exists()
    code, out, _ = cli("reconstruct", pictures, "-o", tmp_path / "out", "--on-error", "skip", "--json", "-")
    report = json.loads(out)
    assert code == 6 and report["pictures"] == 3 and report["failed"] == 1
    assert len(list((tmp_path / "out").glob("*.png"))) == 3 and (tmp_path / "out" / "failures.jsonl").exists()


def test_an_id_that_is_there_twice_is_refused(cli, pictures, tmp_path):
    cli("tokenize", pictures / "photo.jpg", "-o", tmp_path / "t.parquet")
    tokens = Tokens.load(tmp_path / "t.parquet")
    tokens[[0, 0]].save(tmp_path / "twice.parquet")
    code, _, err = cli("detokenize", tmp_path / "twice.parquet", "-o", tmp_path / "out")
    assert code == 3 and "twice" in err and not (tmp_path / "out").exists()


def test_the_tiles_of_a_picture_must_all_be_there(cli, pictures, tmp_path, patch_model):
    cli("tokenize", pictures / "deep.png", "-o", tmp_path / "t.parquet", "--fit", "tile", "--size", 32)
    Tokens.load(tmp_path / "t.parquet")[1:].save(tmp_path / "some.parquet")
    code, _, err = cli("detokenize", tmp_path / "some.parquet", "-o", tmp_path / "out")
    assert code == 3 and "tiles" in err
